// Package main writes an image of one layer as an OCI archive, from files of this machine, with no registry and no
// builder: `ctr images import` takes it.
//
//	image --name carillon:dev --user 65532:65532 --entrypoint /usr/local/bin/carillon FILE=PATH … >archive.tar
//
// A directory cannot be given; those above each PATH come by themselves. A symbolic link is followed. `=PATH` makes an
// empty directory that everyone may write to, as /tmp; `@TARGET=PATH` a symbolic link.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"sort"
	"strings"
	"time"

	"github.com/distribution/reference"
)

// An image of the same files has the same digest, whenever it is made.
var epoch = time.Unix(0, 0)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func main() {
	name := flag.String("name", "", "name and tag of the image, as in a pod")
	user := flag.String("user", "0:0", "user and group that it runs as, as numbers")
	entrypoint := flag.String("entrypoint", "", "program in the image")
	flag.Parse()
	if *name == "" || *entrypoint == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := write(os.Stdout, *name, *user, *entrypoint, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func write(out io.Writer, name, user, entrypoint string, files []string) error {
	// What a pod's `carillon:dev` is called inside of the runtime.
	full, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return fmt.Errorf("--name %s: %w", name, err)
	}
	layer, err := layerOf(files)
	if err != nil {
		return err
	}
	layerDescriptor := describe("application/vnd.oci.image.layer.v1.tar", layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config": map[string]any{
			"User":       user,
			"Entrypoint": []string{entrypoint},
			"WorkingDir": "/",
			"Env":        []string{"PATH=/usr/local/bin:/usr/bin:/bin"},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layerDescriptor.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.manifest.v1+json",
		"config":        describe("application/vnd.oci.image.config.v1+json", config),
		"layers":        []descriptor{layerDescriptor},
	})
	if err != nil {
		return err
	}
	top := describe("application/vnd.oci.image.manifest.v1+json", manifest)
	top.Annotations = map[string]string{"io.containerd.image.name": full.String()}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.index.v1+json",
		"manifests":     []descriptor{top},
	})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(out)
	entries := []struct {
		name    string
		content []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{"index.json", index},
		{blob(manifest), manifest},
		{blob(config), config},
		{blob(layer), layer},
	}
	for _, entry := range entries {
		if err := addFile(archive, entry.name, 0o644, bytes.NewReader(entry.content), int64(len(entry.content))); err != nil {
			return err
		}
	}
	return archive.Close()
}

// The layer, in memory: an image of ours is 150 MB at most.
func layerOf(files []string) ([]byte, error) {
	var buffer bytes.Buffer
	layer := tar.NewWriter(&buffer)
	directories := map[string]int64{}
	sort.Slice(files, func(i, j int) bool { return after(files[i]) < after(files[j]) })
	for _, file := range files {
		from, to, given := strings.Cut(file, "=")
		if !given || !path.IsAbs(to) {
			return nil, fmt.Errorf("%s: not FILE=/PATH", file)
		}
		above := path.Dir(to)
		if from == "" {
			directories[path.Clean(to)] = 0o1777
			above = path.Clean(to)
		}
		if err := addDirectories(layer, above, directories); err != nil {
			return nil, err
		}
		if from == "" {
			continue
		}
		if target, link := strings.CutPrefix(from, "@"); link {
			header := &tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(to, "/"), Linkname: target, Mode: 0o777, ModTime: epoch}
			if err := layer.WriteHeader(header); err != nil {
				return nil, err
			}
			continue
		}
		if err := addFrom(layer, from, to); err != nil {
			return nil, err
		}
	}
	if err := layer.Close(); err != nil {
		return nil, err
	}
	return buffer.Bytes(), nil
}

func after(file string) string {
	_, to, _ := strings.Cut(file, "=")
	return to
}

// The directories down to one that are not there yet. In the map: what they may be done with; -1 when written.
func addDirectories(layer *tar.Writer, directory string, known map[string]int64) error {
	if directory == "/" {
		return nil
	}
	if err := addDirectories(layer, path.Dir(directory), known); err != nil {
		return err
	}
	mode, given := known[directory]
	if mode == -1 {
		return nil
	}
	if !given {
		mode = 0o755
	}
	known[directory] = -1
	return layer.WriteHeader(&tar.Header{
		Typeflag: tar.TypeDir,
		Name:     strings.TrimPrefix(directory, "/") + "/",
		Mode:     mode,
		ModTime:  epoch,
	})
}

func addFrom(layer *tar.Writer, from, to string) error {
	file, err := os.Open(from)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: not a file", from)
	}
	mode := int64(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	return addFile(layer, strings.TrimPrefix(to, "/"), mode, file, info.Size())
}

func addFile(to *tar.Writer, name string, mode int64, content io.Reader, size int64) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: size, ModTime: epoch}
	if err := to.WriteHeader(header); err != nil {
		return err
	}
	if copied, err := io.Copy(to, content); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	} else if copied != size {
		return fmt.Errorf("%s: changed while it was read", name)
	}
	return nil
}

func describe(mediaType string, content []byte) descriptor {
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest(content), Size: int64(len(content))}
}

func blob(content []byte) string { return "blobs/sha256/" + digest(content) }

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
