// Package main makes the volumes of the cluster of the tests: a directory of this machine for each claim of the class
// it serves, removed with all that is in it once the claim is gone. The volumes are of the kind `local`, so that
// fsGroup works in them as it does on a real disk.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// As in the StorageClass.
	provisioner = "carillon.dev/local"
	// Kubernetes' words for whose turn it is: on a claim, and on a volume.
	claimIsFor  = "volume.kubernetes.io/storage-provisioner"
	volumeIsBy  = "pv.kubernetes.io/provisioned-by"
	hostnameKey = "kubernetes.io/hostname"
	// What failed is tried again after this, also when nothing changes.
	again = 5 * time.Second
)

type cluster struct {
	api       kubernetes.Interface
	node      string
	directory string
}

func main() {
	kubeconfig := flag.String("kubeconfig", "", "how to reach the API server")
	node := flag.String("node", "", "name of the node whose directories they are")
	directory := flag.String("directory", "", "where the volumes' directories are made")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *kubeconfig, cluster{node: *node, directory: *directory}); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, kubeconfig string, c cluster) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	if c.api, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(c.api, 0)
	claims, volumes := factory.Core().V1().PersistentVolumeClaims(), factory.Core().V1().PersistentVolumes()
	// One pass over everything whenever something changes: there are dozens, not thousands.
	changed := make(chan struct{}, 1)
	poke := func(any) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{AddFunc: poke, UpdateFunc: func(_, now any) { poke(now) }, DeleteFunc: poke}
	for _, informer := range []cache.SharedIndexInformer{claims.Informer(), volumes.Informer()} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	ticker := time.NewTicker(again)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
		}
		allClaims, err := claims.Lister().List(labels.Everything())
		if err != nil {
			return err
		}
		for _, claim := range allClaims {
			if err := c.provide(ctx, claim); err != nil {
				log.Printf("claim %s/%s: %v", claim.Namespace, claim.Name, err)
			}
		}
		allVolumes, err := volumes.Lister().List(labels.Everything())
		if err != nil {
			return err
		}
		for _, volume := range allVolumes {
			if err := c.reclaim(ctx, volume); err != nil {
				log.Printf("volume %s: %v", volume.Name, err)
			}
		}
	}
}

// provide makes the volume of a claim that waits for one. The controller manager binds the two.
func (c cluster) provide(ctx context.Context, claim *core.PersistentVolumeClaim) error {
	if claim.Annotations[claimIsFor] != provisioner || claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil {
		return nil
	}
	if mode := claim.Spec.VolumeMode; mode != nil && *mode != core.PersistentVolumeFilesystem {
		return fmt.Errorf("only file systems are provided, not %s", *mode)
	}
	// Of the claim's UID: one made again under the same name gets another volume.
	name := "pvc-" + string(claim.UID)
	directory := filepath.Join(c.directory, name)
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	volume := &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: name, Annotations: map[string]string{volumeIsBy: provisioner}},
		Spec: core.PersistentVolumeSpec{
			Capacity:                      core.ResourceList{core.ResourceStorage: claim.Spec.Resources.Requests[core.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: core.PersistentVolumeReclaimDelete,
			StorageClassName:              *claim.Spec.StorageClassName,
			ClaimRef: &core.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim",
				Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
			PersistentVolumeSource: core.PersistentVolumeSource{Local: &core.LocalVolumeSource{Path: directory}},
			NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{
				NodeSelectorTerms: []core.NodeSelectorTerm{{MatchExpressions: []core.NodeSelectorRequirement{
					{Key: hostnameKey, Operator: core.NodeSelectorOpIn, Values: []string{c.node}},
				}}},
			}},
		},
	}
	_, err := c.api.CoreV1().PersistentVolumes().Create(ctx, volume, meta.CreateOptions{})
	if errors.IsAlreadyExists(err) {
		return nil
	}
	if err == nil {
		log.Printf("claim %s/%s: made %s", claim.Namespace, claim.Name, directory)
	}
	return err
}

// reclaim removes a volume of ours that its claim has left, and its data.
func (c cluster) reclaim(ctx context.Context, volume *core.PersistentVolume) error {
	if volume.Annotations[volumeIsBy] != provisioner || volume.Status.Phase != core.VolumeReleased ||
		volume.Spec.PersistentVolumeReclaimPolicy != core.PersistentVolumeReclaimDelete || volume.Spec.Local == nil {
		return nil
	}
	directory := volume.Spec.Local.Path
	if filepath.Dir(directory) != filepath.Clean(c.directory) {
		return fmt.Errorf("%s is not in %s", directory, c.directory)
	}
	if err := os.RemoveAll(directory); err != nil {
		return err
	}
	err := c.api.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, meta.DeleteOptions{
		Preconditions: &meta.Preconditions{UID: &volume.UID},
	})
	if errors.IsNotFound(err) {
		return nil
	}
	if err == nil {
		log.Printf("volume %s: removed %s", volume.Name, directory)
	}
	return err
}
