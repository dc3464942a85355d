/* Checks with Paho's C library, a client nobody here wrote: `paho_checks NAME URI [CA]`, `paho_checks list`.
 * Exit code 0 = it holds. URI is tcp://, ssl://, ws://…/mqtt or wss://…/mqtt; CA is the authority of the last two. */

#define _GNU_SOURCE
#include <MQTTAsync.h>
#include <arpa/inet.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_MS = 15000, MAX_CODES = 8 };

static const char *uri, *ca;

static _Noreturn void fail(int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "line %d: ", line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

#define HOLDS(what) ((what) ? (void)0 : fail(__LINE__, "not so: %s", #what))
#define EQUAL(left, right)                                                              \
    do {                                                                                \
        long long left_ = (left), right_ = (right);                                     \
        if (left_ != right_) fail(__LINE__, "%s is %lld, not %lld", #left, left_, right_); \
    } while (0)

static char *formatted(const char *format, ...) {
    va_list arguments;
    char *out;
    va_start(arguments, format);
    HOLDS(vasprintf(&out, format, arguments) >= 0);
    va_end(arguments);
    return out;
}

/* ---- Devices: what the library's threads say, and waiting for it. ---- */

/* All devices share one lock: simple, and nothing here is about speed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* What became of a request. */
typedef struct {
    bool is_done, is_good;
    int count, codes[MAX_CODES];
    bool session_present;
    MQTTProperties properties;
} Answer;

typedef struct Message {
    struct Message *next;
    char *topic;
    MQTTAsync_message *message;
} Message;

typedef struct {
    MQTTAsync handle;
    int version;
    Answer connack;
    Message *first, **last;
    int delivered;    /* messages of its own that are acknowledged */
    int connections;  /* how often it was connected */
    int disconnect;   /* reason code of the server's DISCONNECT; -1: none came */
    int lost;         /* how often its connection was lost */
    int delay_ms;     /* for how long it holds each message before it is acknowledged */
} Device;

typedef struct {
    int version;
    bool kept;
    int expiry, keep_alive;
    const char *user, *password;
    MQTTAsync_willOptions *will;
    MQTTProperties *properties, *will_properties;
    bool reconnects;
    const char *ca;
    const char *uri;
} Options;

static struct timespec in_ms(int ms) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    at.tv_sec += ms / 1000;
    at.tv_nsec += ms % 1000 * 1000000L;
    if (at.tv_nsec >= 1000000000L) at.tv_sec++, at.tv_nsec -= 1000000000L;
    return at;
}

/* Waits until something holds; gives whether it does. The caller has the lock. */
#define WAIT(what, ms)                                                                           \
    ({                                                                                           \
        struct timespec until_ = in_ms(ms);                                                      \
        int late_ = 0;                                                                           \
        while (!(what) && !late_) late_ = pthread_cond_timedwait(&changed, &lock, &until_) != 0; \
        (what);                                                                                  \
    })

#define AWAIT(what)                                                                                \
    do {                                                                                           \
        pthread_mutex_lock(&lock);                                                                 \
        if (!WAIT(what, PATIENCE_MS)) fail(__LINE__, "not within %d ms: %s", PATIENCE_MS, #what);  \
        pthread_mutex_unlock(&lock);                                                               \
    } while (0)

static void answered(Answer *answer, bool is_good) {
    answer->is_done = true;
    answer->is_good = is_good;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* How many codes are expected was said before: for a single filter the library leaves the array undefined. */
static void take_codes(Answer *answer, int count, const enum MQTTReasonCodes *codes, int only) {
    if (answer->count < 2) {
        answer->codes[0] = only;
        return;
    }
    answer->count = count > MAX_CODES ? MAX_CODES : count;
    for (int i = 0; i < answer->count; i++) answer->codes[i] = codes[i];
}

static void connected(void *context, MQTTAsync_successData *data) {
    pthread_mutex_lock(&lock);
    ((Answer *)context)->session_present = data->alt.connect.sessionPresent;
    answered(context, true);
}

static void connected5(void *context, MQTTAsync_successData5 *data) {
    Answer *answer = context;
    pthread_mutex_lock(&lock);
    answer->session_present = data->alt.connect.sessionPresent;
    answer->codes[0] = data->reasonCode;
    answer->properties = MQTTProperties_copy(&data->properties);
    answered(answer, true);
}

static void subscribed(void *context, MQTTAsync_successData *data) {
    pthread_mutex_lock(&lock);
    ((Answer *)context)->codes[0] = data->alt.qos;
    answered(context, true);
}

static void subscribed5(void *context, MQTTAsync_successData5 *data) {
    pthread_mutex_lock(&lock);
    take_codes(context, data->alt.sub.reasonCodeCount, data->alt.sub.reasonCodes, data->reasonCode);
    answered(context, true);
}

static void unsubscribed5(void *context, MQTTAsync_successData5 *data) {
    pthread_mutex_lock(&lock);
    take_codes(context, data->alt.unsub.reasonCodeCount, data->alt.unsub.reasonCodes, data->reasonCode);
    answered(context, true);
}

static void done(void *context, MQTTAsync_successData *data) {
    (void)data;
    pthread_mutex_lock(&lock);
    answered(context, true);
}

static void done5(void *context, MQTTAsync_successData5 *data) {
    pthread_mutex_lock(&lock);
    ((Answer *)context)->codes[0] = data->reasonCode;
    answered(context, true);
}

static void failed(void *context, MQTTAsync_failureData *data) {
    pthread_mutex_lock(&lock);
    ((Answer *)context)->codes[0] = data->code;
    answered(context, false);
}

static void failed5(void *context, MQTTAsync_failureData5 *data) {
    pthread_mutex_lock(&lock);
    ((Answer *)context)->codes[0] = data->reasonCode ? (int)data->reasonCode : data->code;
    answered(context, false);
}

static int arrived(void *context, char *topic, int topic_bytes, MQTTAsync_message *message) {
    (void)topic_bytes;
    Device *device = context;
    if (device->delay_ms) usleep(device->delay_ms * 1000);
    Message *new = calloc(1, sizeof *new);
    *new = (Message){.topic = topic, .message = message};
    pthread_mutex_lock(&lock);
    *device->last = new;
    device->last = &new->next;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return 1;
}

static void delivered(void *context, MQTTAsync_token token) {
    (void)token;
    pthread_mutex_lock(&lock);
    ((Device *)context)->delivered++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void lost(void *context, char *cause) {
    (void)cause;
    pthread_mutex_lock(&lock);
    ((Device *)context)->lost++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void is_connected(void *context, char *cause) {
    (void)cause;
    pthread_mutex_lock(&lock);
    ((Device *)context)->connections++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void told_to_go(void *context, MQTTProperties *properties, enum MQTTReasonCodes reason) {
    (void)properties;
    pthread_mutex_lock(&lock);
    ((Device *)context)->disconnect = reason;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Connects, whatever comes of it. */
static Device *try(const char *client_id, Options options) {
    Device *device = calloc(1, sizeof *device);
    device->last = &device->first;
    device->disconnect = -1;
    device->version = options.version ? options.version : MQTTVERSION_5;
    bool v5 = device->version == MQTTVERSION_5;
    const char *server = options.uri ? options.uri : uri;

    MQTTAsync_createOptions create = MQTTAsync_createOptions_initializer5;
    create.MQTTVersion = device->version;
    create.sendWhileDisconnected = options.reconnects;
    create.maxBufferedMessages = 1000;
    EQUAL(MQTTAsync_createWithOptions(&device->handle, server, client_id, MQTTCLIENT_PERSISTENCE_NONE, NULL, &create), 0);
    EQUAL(MQTTAsync_setCallbacks(device->handle, device, lost, arrived, delivered), 0);
    EQUAL(MQTTAsync_setConnected(device->handle, device, is_connected), 0);
    if (v5) EQUAL(MQTTAsync_setDisconnected(device->handle, device, told_to_go), 0);

    MQTTAsync_connectOptions four = MQTTAsync_connectOptions_initializer;
    MQTTAsync_connectOptions five = MQTTAsync_connectOptions_initializer5;
    MQTTAsync_connectOptions connect = v5 ? five : four;
    MQTTProperties properties = options.properties ? *options.properties : (MQTTProperties)MQTTProperties_initializer;
    MQTTAsync_SSLOptions tls = MQTTAsync_SSLOptions_initializer;
    connect.MQTTVersion = device->version;
    connect.keepAliveInterval = options.keep_alive ? options.keep_alive : 60;
    connect.connectTimeout = PATIENCE_MS / 1000;
    connect.username = options.user;
    connect.password = options.password;
    connect.will = options.will;
    connect.context = &device->connack;
    if (options.reconnects) {
        connect.automaticReconnect = 1;
        connect.minRetryInterval = connect.maxRetryInterval = 1;
    }
    if (v5) {
        if (options.expiry) {
            MQTTProperty expiry = {MQTTPROPERTY_CODE_SESSION_EXPIRY_INTERVAL, .value.integer4 = options.expiry};
            MQTTProperties_add(&properties, &expiry);
        }
        connect.cleanstart = !options.kept;
        connect.connectProperties = &properties;
        connect.willProperties = options.will_properties;
        connect.onSuccess5 = connected5;
        connect.onFailure5 = failed5;
    } else {
        connect.cleansession = !options.kept;
        connect.onSuccess = connected;
        connect.onFailure = failed;
    }
    if (!strncmp(server, "ssl:", 4) || !strncmp(server, "wss:", 4)) {
        tls.trustStore = options.ca ? options.ca : ca;
        tls.verify = 1;
        connect.ssl = &tls;
    }
    EQUAL(MQTTAsync_connect(device->handle, &connect), 0);
    AWAIT(device->connack.is_done);
    return device;
}

static Device *device_with(const char *client_id, Options options) {
    Device *device = try(client_id, options);
    if (!device->connack.is_good) fail(__LINE__, "%s is refused: %d", client_id, device->connack.codes[0]);
    return device;
}

static Device *of(int version, const char *name) {
    return device_with(formatted("%s-%d", name, version), (Options){.version = version});
}

static Device *device(const char *client_id) { return device_with(client_id, (Options){0}); }

static Answer finished(Answer *answer) {
    AWAIT(answer->is_done);
    return *answer;
}

static MQTTAsync_responseOptions response(Device *device, Answer *answer) {
    MQTTAsync_responseOptions options = MQTTAsync_responseOptions_initializer;
    options.context = answer;
    if (device->version == MQTTVERSION_5) {
        options.onSuccess5 = done5;
        options.onFailure5 = failed5;
    } else {
        options.onSuccess = done;
        options.onFailure = failed;
    }
    return options;
}

static int subscribe_with(Device *device, const char *filter, int qos, MQTTSubscribe_options *how) {
    Answer answer = {0};
    MQTTAsync_responseOptions options = response(device, &answer);
    if (options.onSuccess5) options.onSuccess5 = subscribed5;
    if (options.onSuccess) options.onSuccess = subscribed;
    if (how) options.subscribeOptions = *how;
    EQUAL(MQTTAsync_subscribe(device->handle, filter, qos, &options), 0);
    return finished(&answer).codes[0];
}

static void subscribe(Device *device, const char *filter, int qos) {
    EQUAL(subscribe_with(device, filter, qos, NULL), qos);
}

static int unsubscribe(Device *device, const char *filter) {
    Answer answer = {0};
    MQTTAsync_responseOptions options = response(device, &answer);
    if (options.onSuccess5) options.onSuccess5 = unsubscribed5;
    EQUAL(MQTTAsync_unsubscribe(device->handle, filter, &options), 0);
    HOLDS(finished(&answer).is_good);
    return answer.codes[0];
}

/* Publishes without waiting for anything. */
static int offer(Device *device, const char *topic, const char *payload, int qos) {
    MQTTAsync_message message = MQTTAsync_message_initializer;
    message.payload = (char *)payload;
    message.payloadlen = strlen(payload);
    message.qos = qos;
    return MQTTAsync_sendMessage(device->handle, topic, &message, NULL);
}

/* Publishes and waits until that is acknowledged; gives the reason code. */
static int publish_with(Device *device, const char *topic, const char *payload, int qos, bool retain,
                        MQTTProperties *properties) {
    Answer answer = {0};
    MQTTAsync_responseOptions options = response(device, &answer);
    MQTTAsync_message message = MQTTAsync_message_initializer;
    message.payload = (char *)payload;
    message.payloadlen = strlen(payload);
    message.qos = qos;
    message.retained = retain;
    if (properties) message.properties = *properties;
    EQUAL(MQTTAsync_sendMessage(device->handle, topic, &message, &options), 0);
    return finished(&answer).codes[0];
}

static void publish(Device *device, const char *topic, const char *payload, int qos) {
    EQUAL(publish_with(device, topic, payload, qos, false, NULL), 0);
}

/* The next message; it stays allocated, like all here. */
static Message *next(Device *device) {
    AWAIT(device->first);
    pthread_mutex_lock(&lock);
    Message *message = device->first;
    device->first = message->next;
    if (!device->first) device->last = &device->first;
    pthread_mutex_unlock(&lock);
    return message;
}

static bool says(const Message *message, const char *payload) {
    return message->message->payloadlen == (int)strlen(payload) &&
           !memcmp(message->message->payload, payload, strlen(payload));
}

static Message *expect_at(int line, Device *device, const char *payload) {
    Message *message = next(device);
    if (!says(message, payload))
        fail(line, "\"%.*s\" came, not \"%s\"", message->message->payloadlen, (char *)message->message->payload, payload);
    return message;
}
#define EXPECT(device, payload) expect_at(__LINE__, device, payload)

static void nothing_at(int line, Device *device) {
    pthread_mutex_lock(&lock);
    if (WAIT(device->first, 700))
        fail(line, "unexpected: %s \"%.*s\"", device->first->topic, device->first->message->payloadlen,
             (char *)device->first->message->payload);
    pthread_mutex_unlock(&lock);
}
#define nothing(device) nothing_at(__LINE__, device)

/* Slow: the library's thread looks up once a second. Only for who comes back in the same check. */
static void leave(Device *device) {
    Answer answer = {0};
    MQTTAsync_disconnectOptions options = MQTTAsync_disconnectOptions_initializer5;
    options.context = &answer;
    if (device->version == MQTTVERSION_5) {
        options.onSuccess5 = done5;
    } else {
        options.struct_version = 0;
        options.onSuccess = done;
    }
    EQUAL(MQTTAsync_disconnect(device->handle, &options), 0);
    finished(&answer);
    MQTTAsync_destroy(&device->handle);
}

static bool is_to_the_server(int fd) {
    const char *port = strrchr(uri, ':') + 1;
    struct sockaddr_in peer;
    socklen_t bytes = sizeof peer;
    return !getpeername(fd, (struct sockaddr *)&peer, &bytes) && peer.sin_family == AF_INET &&
           ntohs(peer.sin_port) == atoi(port);
}

/* The network is gone, for all devices of this process or, with the newest one's, for that alone: no DISCONNECT. */
static void cut(bool newest_only) {
    for (int fd = 1023; fd > 2; fd--) {
        if (!is_to_the_server(fd)) continue;
        shutdown(fd, SHUT_RDWR);
        if (newest_only) return;
    }
}

static void vanish(Device *device) {
    cut(true);
    AWAIT(device->lost == 1);
}

/* ---- Properties ---- */

static void add_number(MQTTProperties *to, enum MQTTPropertyCodes code, unsigned value) {
    MQTTProperty property = {.identifier = code};
    switch (MQTTProperty_getType(code)) {
    case MQTTPROPERTY_TYPE_BYTE: property.value.byte = value; break;
    case MQTTPROPERTY_TYPE_TWO_BYTE_INTEGER: property.value.integer2 = value; break;
    default: property.value.integer4 = value;
    }
    EQUAL(MQTTProperties_add(to, &property), 0);
}

static void add_text(MQTTProperties *to, enum MQTTPropertyCodes code, const char *name, const char *value) {
    MQTTProperty property = {.identifier = code};
    property.value.data = (MQTTLenString){strlen(name), (char *)name};
    if (value) property.value.value = (MQTTLenString){strlen(value), (char *)value};
    EQUAL(MQTTProperties_add(to, &property), 0);
}

static int number(Message *message, enum MQTTPropertyCodes code) {
    return MQTTProperties_getNumericValue(&message->message->properties, code);
}

static bool is_text(MQTTLenString text, const char *wanted) {
    return text.len == (int)strlen(wanted) && !memcmp(text.data, wanted, text.len);
}

static MQTTLenString text(Message *message, enum MQTTPropertyCodes code) {
    MQTTProperty *property = MQTTProperties_getProperty(&message->message->properties, code);
    if (!property) fail(__LINE__, "there is no %s", MQTTPropertyName(code));
    return property->value.data;
}

static const int VERSIONS[] = {MQTTVERSION_3_1_1, MQTTVERSION_5};
#define EACH_VERSION(version) \
    for (int i_ = 0, version = VERSIONS[0]; i_ < 2; version = VERSIONS[++i_ & 1])

/* ---- The checks ---- */

static void everything_arrives_once_in_order(void) {
    EACH_VERSION(version) {
        Device *receiver = of(version, "receiver");
        Device *sender = of(version, "sender");
        for (int qos = 0; qos < 3; qos++) {
            char *topic = formatted("order/%d/%d", version, qos);
            subscribe(receiver, topic, qos);
            for (int i = 0; i < 200; i++) EQUAL(offer(sender, topic, formatted("%d", i), qos), 0);
            for (int i = 0; i < 200; i++) {
                Message *message = EXPECT(receiver, formatted("%d", i));
                EQUAL(message->message->qos, qos);
                HOLDS(!strcmp(message->topic, topic));
                EQUAL(message->message->dup, 0);
            }
        }
        nothing(receiver);
        AWAIT(sender->delivered >= 400);
    }
}

static void quality_of_service_is_the_lower_of_both(void) {
    EACH_VERSION(version) {
        Device *receiver = of(version, "receiver");
        for (int subscribed = 0; subscribed < 3; subscribed++) {
            char *topic = formatted("lower/%d/%d", version, subscribed);
            subscribe(receiver, topic, subscribed);
            for (int published = 0; published < 3; published++) {
                publish(receiver, topic, "x", published);
                EQUAL(EXPECT(receiver, "x")->message->qos, subscribed < published ? subscribed : published);
            }
        }
    }
}

static void sessions_are_kept(void) {
    EACH_VERSION(version) {
        Options kept = {.version = version, .kept = true, .expiry = 3600};
        char *topic = formatted("sessions/%d", version), *name = formatted("kept-%d", version);
        Device *sender = of(version, "sender");
        Device *first = device_with(name, kept);
        HOLDS(!first->connack.session_present);
        subscribe(first, topic, 2);
        leave(first);
        for (int i = 0; i < 60; i++) publish(sender, topic, formatted("%d", i), 1 + i / 30);
        Device *second = device_with(name, kept);
        HOLDS(second->connack.session_present);
        for (int i = 0; i < 60; i++) EQUAL(EXPECT(second, formatted("%d", i))->message->qos, 1 + i / 30);
        nothing(second);
        leave(second);
        Device *clean = device_with(name, (Options){.version = version});
        HOLDS(!clean->connack.session_present);
        leave(clean);
        Device *anew = device_with(name, kept);
        HOLDS(!anew->connack.session_present);
    }
}

static void sessions_expire(void) {
    Options brief = {.kept = true, .expiry = 1};
    Device *first = device_with("brief", brief);
    subscribe(first, "brief/topic", 1);
    leave(first);
    sleep(3);
    HOLDS(!device_with("brief", brief)->connack.session_present);
}

static void retained_messages(void) {
    EACH_VERSION(version) {
        char *topic = formatted("retained/%d", version);
        Device *sender = of(version, "sender");
        Device *early = of(version, "early");
        subscribe(early, topic, 1);
        EQUAL(publish_with(sender, topic, "kept", 1, true, NULL), 0);
        HOLDS(!EXPECT(early, "kept")->message->retained);
        Device *late = of(version, "late");
        subscribe(late, topic, 1);
        HOLDS(EXPECT(late, "kept")->message->retained);
        EQUAL(publish_with(sender, topic, "", 1, true, NULL), 0);
        EXPECT(late, "");
        Device *latest = of(version, "latest");
        subscribe(latest, topic, 1);
        nothing(latest);
    }
}

static void wills_are_sent(void) {
    EACH_VERSION(version) {
        char *topic = formatted("wills/%d", version);
        Device *watcher = of(version, "watcher");
        subscribe(watcher, topic, 2);
        MQTTAsync_willOptions will = MQTTAsync_willOptions_initializer;
        will.topicName = topic;
        will.message = "gone";
        will.qos = 2;
        MQTTProperties properties = MQTTProperties_initializer;
        add_text(&properties, MQTTPROPERTY_CODE_USER_PROPERTY, "why", "lost");
        add_text(&properties, MQTTPROPERTY_CODE_CONTENT_TYPE, "text/plain", NULL);
        Options options = {.version = version, .will = &will};
        if (version == MQTTVERSION_5) options.will_properties = &properties;
        leave(device_with(formatted("leaves-%d", version), options));
        nothing(watcher);
        vanish(device_with(formatted("lost-%d", version), options));
        Message *message = EXPECT(watcher, "gone");
        EQUAL(message->message->qos, 2);
        if (version == MQTTVERSION_5) {
            HOLDS(is_text(text(message, MQTTPROPERTY_CODE_USER_PROPERTY), "why"));
            HOLDS(is_text(text(message, MQTTPROPERTY_CODE_CONTENT_TYPE), "text/plain"));
        }
    }
}

static void a_will_may_be_delayed(void) {
    Device *watcher = device("watcher");
    subscribe(watcher, "delayed", 1);
    MQTTAsync_willOptions will = MQTTAsync_willOptions_initializer;
    will.topicName = "delayed";
    will.message = "gone";
    will.qos = 1;
    MQTTProperties properties = MQTTProperties_initializer;
    add_number(&properties, MQTTPROPERTY_CODE_WILL_DELAY_INTERVAL, 3);
    Options options = {.kept = true, .expiry = 60, .will = &will, .will_properties = &properties};
    vanish(device_with("lost", options));
    /* Who is back in time has not died [MQTT-3.1.3-9]. */
    Device *back = device_with("lost", options);
    HOLDS(back->connack.session_present);
    sleep(3);
    nothing(watcher);
    vanish(back);
    nothing(watcher);
    EXPECT(watcher, "gone");
}

static void properties_travel(void) {
    Device *receiver = device("receiver"), *sender = device("sender");
    subscribe(receiver, "props", 1);
    MQTTProperties p = MQTTProperties_initializer;
    add_number(&p, MQTTPROPERTY_CODE_PAYLOAD_FORMAT_INDICATOR, 1);
    add_number(&p, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL, 600);
    add_text(&p, MQTTPROPERTY_CODE_CONTENT_TYPE, "text/plain", NULL);
    add_text(&p, MQTTPROPERTY_CODE_RESPONSE_TOPIC, "answers/here", NULL);
    add_text(&p, MQTTPROPERTY_CODE_CORRELATION_DATA, "\x01\xff binary", NULL);
    add_text(&p, MQTTPROPERTY_CODE_USER_PROPERTY, "a", "1");
    add_text(&p, MQTTPROPERTY_CODE_USER_PROPERTY, "b", "2");
    add_text(&p, MQTTPROPERTY_CODE_USER_PROPERTY, "a", "3");
    EQUAL(publish_with(sender, "props", "text", 1, false, &p), 0);
    Message *got = EXPECT(receiver, "text");
    EQUAL(number(got, MQTTPROPERTY_CODE_PAYLOAD_FORMAT_INDICATOR), 1);
    int left = number(got, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL);
    HOLDS(590 <= left && left <= 600);
    HOLDS(is_text(text(got, MQTTPROPERTY_CODE_CONTENT_TYPE), "text/plain"));
    HOLDS(is_text(text(got, MQTTPROPERTY_CODE_RESPONSE_TOPIC), "answers/here"));
    HOLDS(is_text(text(got, MQTTPROPERTY_CODE_CORRELATION_DATA), "\x01\xff binary"));
    const char *own[][2] = {{"a", "1"}, {"b", "2"}, {"a", "3"}};
    EQUAL(MQTTProperties_propertyCount(&got->message->properties, MQTTPROPERTY_CODE_USER_PROPERTY), 3);
    for (int i = 0; i < 3; i++) {
        MQTTProperty *pair =
            MQTTProperties_getPropertyAt(&got->message->properties, MQTTPROPERTY_CODE_USER_PROPERTY, i);
        HOLDS(is_text(pair->value.data, own[i][0]) && is_text(pair->value.value, own[i][1]));
    }
}

static void messages_expire(void) {
    Options kept = {.kept = true, .expiry = 3600};
    Device *sender = device("sender"), *first = device_with("away", kept);
    subscribe(first, "expiring", 1);
    leave(first);
    MQTTProperties brief = MQTTProperties_initializer, lasting = MQTTProperties_initializer;
    add_number(&brief, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL, 1);
    add_number(&lasting, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL, 100);
    EQUAL(publish_with(sender, "expiring", "brief", 1, false, &brief), 0);
    EQUAL(publish_with(sender, "expiring", "lasting", 1, false, &lasting), 0);
    sleep(3);
    Device *second = device_with("away", kept);
    Message *got = EXPECT(second, "lasting");
    int left = number(got, MQTTPROPERTY_CODE_MESSAGE_EXPIRY_INTERVAL);
    HOLDS(90 <= left && left <= 98);
    nothing(second);
}

static void request_and_response(void) {
    Device *answerer = device("answerer"), *asker = device("asker");
    subscribe(answerer, "question", 1);
    subscribe(asker, "answer/asker", 1);
    MQTTProperties p = MQTTProperties_initializer;
    add_text(&p, MQTTPROPERTY_CODE_RESPONSE_TOPIC, "answer/asker", NULL);
    add_text(&p, MQTTPROPERTY_CODE_CORRELATION_DATA, "42", NULL);
    EQUAL(publish_with(asker, "question", "what is it?", 1, false, &p), 0);
    Message *question = EXPECT(answerer, "what is it?");
    MQTTLenString where = text(question, MQTTPROPERTY_CODE_RESPONSE_TOPIC);
    MQTTProperties back = MQTTProperties_initializer;
    add_text(&back, MQTTPROPERTY_CODE_CORRELATION_DATA, "42", NULL);
    EQUAL(publish_with(answerer, strndup(where.data, where.len), "this", 1, false, &back), 0);
    HOLDS(is_text(text(EXPECT(asker, "this"), MQTTPROPERTY_CODE_CORRELATION_DATA), "42"));
}

static void aliases_both_ways(void) {
    MQTTProperties allow = MQTTProperties_initializer, alias = MQTTProperties_initializer;
    add_number(&allow, MQTTPROPERTY_CODE_TOPIC_ALIAS_MAXIMUM, 5);
    add_number(&alias, MQTTPROPERTY_CODE_TOPIC_ALIAS, 3);
    Device *receiver = device_with("receiver", (Options){.properties = &allow}), *sender = device("sender");
    EQUAL(MQTTProperties_getNumericValue(&sender->connack.properties, MQTTPROPERTY_CODE_TOPIC_ALIAS_MAXIMUM), 16);
    subscribe(receiver, "aliased/topic", 1);
    EQUAL(publish_with(sender, "aliased/topic", "0", 1, false, &alias), 0);
    EQUAL(publish_with(sender, "", "1", 1, false, &alias), 0);
    EQUAL(publish_with(sender, "", "2", 2, false, &alias), 0);
    for (int i = 0; i < 3; i++) {
        Message *got = EXPECT(receiver, formatted("%d", i));
        EQUAL(number(got, MQTTPROPERTY_CODE_TOPIC_ALIAS), 1);
        /* The library hands aliases on, and does not put the topic back. */
        HOLDS(!strcmp(got->topic, i ? "" : "aliased/topic"));
    }
}

static void receive_maximum_is_kept(void) {
    MQTTProperties one = MQTTProperties_initializer;
    add_number(&one, MQTTPROPERTY_CODE_RECEIVE_MAXIMUM, 1);
    Device *receiver = device_with("slow", (Options){.properties = &one}), *sender = device("sender");
    receiver->delay_ms = 2;
    EQUAL(MQTTProperties_getNumericValue(&sender->connack.properties, MQTTPROPERTY_CODE_RECEIVE_MAXIMUM), 64);
    subscribe(receiver, "flow", 2);
    /* More than the server's maximum: the library must keep to it, else this would end with 0x93. */
    for (int i = 0; i < 300; i++) EQUAL(offer(sender, "flow", formatted("%d", i), 1 + i % 2), 0);
    bool seen[300] = {false};
    int last_of[2] = {-1, -1};
    for (int i = 0; i < 300; i++) {
        Message *got = next(receiver);
        int which = atoi(strndup(got->message->payload, got->message->payloadlen));
        HOLDS(!seen[which]);
        seen[which] = true;
        /* Who publishes with both may be overtaken by himself: QoS 2 is held here until its PUBREL (4.6.0-6). */
        HOLDS(last_of[which % 2] < which);
        last_of[which % 2] = which;
    }
    AWAIT(sender->delivered == 300);
    EQUAL(sender->disconnect, -1);
}

static void server_keep_alive(void) {
    Device *asks_more = device_with("more", (Options){.keep_alive = 60});
    EQUAL(MQTTProperties_getNumericValue(&asks_more->connack.properties, MQTTPROPERTY_CODE_SERVER_KEEP_ALIVE), 4);
    Device *asks_less = device_with("less", (Options){.keep_alive = 3});
    HOLDS(!MQTTProperties_hasProperty(&asks_less->connack.properties, MQTTPROPERTY_CODE_SERVER_KEEP_ALIVE));
    /* The library keeps to its own 60 seconds all the same: the server may disconnect it, and says why. */
    AWAIT(asks_more->disconnect == 0x8D);
    publish(asks_less, "still/there", "x", 1);
    EQUAL(asks_less->disconnect, -1);
}

/* Longer than `max_topic_bytes`: refused by itself, without harm to the connection. */
static char too_long[2001];

static void reason_codes(void) {
    memset(too_long, 'x', sizeof too_long - 1);
    Device *device_ = device("codes");
    /* "No matching subscribers" (0x10) may be told, but need not be (section 3.4.2.1). */
    int code = publish_with(device_, "nobody/listens", "x", 1, false, NULL);
    HOLDS(code == 0 || code == 0x10);
    for (int qos = 0; qos < 3; qos++) EQUAL(subscribe_with(device_, "codes/topic", qos, NULL), qos);
    EQUAL(unsubscribe(device_, "codes/topic"), 0);
    EQUAL(unsubscribe(device_, "codes/topic"), 0x11);
    EQUAL(subscribe_with(device_, too_long, 1, NULL), 0x8F);
    Device *four = device_with("four", (Options){.version = MQTTVERSION_3_1_1});
    EQUAL(subscribe_with(four, too_long, 1, NULL), 0x80);
}

static void many_filters_have_a_code_each(void) {
    memset(too_long, 'x', sizeof too_long - 1);
    Device *device_ = device("many");
    char *filters[] = {"many/a", too_long, "many/+", "many/c"};
    int qos[] = {0, 1, 2, 1}, granted[] = {0, 0x8F, 2, 1};
    Answer answer = {.count = 4};
    MQTTAsync_responseOptions options = response(device_, &answer);
    options.onSuccess5 = subscribed5;
    MQTTSubscribe_options list[4];
    for (int i = 0; i < 4; i++) list[i] = (MQTTSubscribe_options)MQTTSubscribe_options_initializer;
    options.subscribeOptionsList = list;
    options.subscribeOptionsCount = 4;
    EQUAL(MQTTAsync_subscribeMany(device_->handle, 4, filters, qos, &options), 0);
    HOLDS(finished(&answer).is_good);
    EQUAL(answer.count, 4);
    for (int i = 0; i < 4; i++) EQUAL(answer.codes[i], granted[i]);
    Answer gone = {.count = 3};
    options = response(device_, &gone);
    options.onSuccess5 = unsubscribed5;
    char *other[] = {"many/c", "never/there", "many/a"};
    int codes[] = {0, 0x11, 0};
    EQUAL(MQTTAsync_unsubscribeMany(device_->handle, 3, other, &options), 0);
    HOLDS(finished(&gone).is_good);
    EQUAL(gone.count, 3);
    for (int i = 0; i < 3; i++) EQUAL(gone.codes[i], codes[i]);
    publish(device_, "many/c", "x", 1);
    EQUAL(EXPECT(device_, "x")->message->qos, 1);
    nothing(device_);
}

static void bad_tokens_are_refused(void) {
    Device *five = try("intruder", (Options){.user = "alice", .password = "not.a.token"});
    HOLDS(!five->connack.is_good);
    HOLDS(five->connack.codes[0] == 0x86 || five->connack.codes[0] == 0x87);
    Device *four = try("intruder", (Options){.version = MQTTVERSION_3_1_1, .user = "alice", .password = "not.a.token"});
    HOLDS(!four->connack.is_good);
    HOLDS(four->connack.codes[0] == 4 || four->connack.codes[0] == 5);
}

static void taken_over(void) {
    Device *first = device("one-device"), *second = device("one-device");
    AWAIT(first->disconnect == 0x8E);
    subscribe(second, "still/there", 1);
    publish(second, "still/there", "x", 1);
    EXPECT(second, "x");
    EQUAL(second->disconnect, -1);
}

static void subscription_options(void) {
    Device *device_ = device("optioned"), *other = device("other");
    MQTTSubscribe_options how = MQTTSubscribe_options_initializer;
    how.noLocal = 1;
    EQUAL(subscribe_with(device_, "local", 1, &how), 1);
    publish(device_, "local", "mine", 1);
    publish(other, "local", "theirs", 1);
    EXPECT(device_, "theirs");
    publish_with(other, "kept", "retained", 1, true, NULL);
    how = (MQTTSubscribe_options)MQTTSubscribe_options_initializer;
    how.retainHandling = 2;
    EQUAL(subscribe_with(device_, "kept", 1, &how), 1);
    nothing(device_);
    how.retainHandling = 0;
    EQUAL(subscribe_with(device_, "kept", 1, &how), 1);
    HOLDS(EXPECT(device_, "retained")->message->retained);
    how.retainHandling = 1;
    how.retainAsPublished = 1;
    EQUAL(subscribe_with(device_, "kept", 1, &how), 1);
    EQUAL(publish_with(other, "kept", "again", 1, true, NULL), 0);
    HOLDS(EXPECT(device_, "again")->message->retained);
    nothing(device_);
}

static void shared_subscriptions(void) {
    Device *sender = device("sender"), *one = device("one");
    Device *two = device_with("two", (Options){.version = MQTTVERSION_3_1_1});
    subscribe(one, "$share/group/work", 1);
    subscribe(two, "$share/group/work", 1);
    bool seen[20] = {false};
    for (int i = 0; i < 20; i++) publish(sender, "work", formatted("%d", i), 1);
    for (int i = 0; i < 20; i++) {
        Message *got = next(i % 2 ? one : two);
        int which = atoi(strndup(got->message->payload, got->message->payloadlen));
        HOLDS(!seen[which]);
        seen[which] = true;
    }
    nothing(one), nothing(two);
}

static void over_another_transport(void) {
    EACH_VERSION(version) {
        Device *receiver = of(version, "receiver");
        subscribe(receiver, "transport", 2);
        /* Beyond every buffer, and any length that one frame header or TLS record could hide. */
        char *large = malloc(300001);
        for (int i = 0; i < 300000; i++) large[i] = 'a' + i % 26;
        large[300000] = 0;
        for (int qos = 0; qos < 3; qos++) {
            publish(receiver, "transport", "small", qos);
            publish(receiver, "transport", large, qos);
            EXPECT(receiver, "small");
            HOLDS(says(next(receiver), large));
        }
        for (int i = 0; i < 200; i++) EQUAL(offer(receiver, "transport", formatted("%d", i), 1), 0);
        for (int i = 0; i < 200; i++) EXPECT(receiver, formatted("%d", i));
        /* The library mixes up two WebSocket connections over TLS that are read at the same time. */
        leave(receiver);
    }
    if (ca && !strncmp(uri, "ssl:", 4)) {
        /* Who does not know the authority is right not to come. */
        Device *wary = try("wary", (Options){.ca = "/etc/ssl/certs/ca-certificates.crt"});
        HOLDS(!wary->connack.is_good);
    }
}

/* By what the library still waits for: of what it has sent again it does not always say that it is delivered. */
static void all_are_acknowledged(Device *device) {
    MQTTAsync_token *waiting = NULL;
    for (int ms = 0; ms < PATIENCE_MS; ms += 20) {
        EQUAL(MQTTAsync_getPendingTokens(device->handle, &waiting), 0);
        if (!waiting) return;
        MQTTAsync_free(waiting);
        usleep(20000);
    }
    fail(__LINE__, "messages are still not acknowledged");
}

static void lost_connections_are_made_again(void) {
    enum { ROUNDS = 2, EACH = 30, ALL = ROUNDS * EACH };
    Device *receivers[2], *senders[2];
    char *topics[2];
    for (int v = 0; v < 2; v++) {
        Options options = {.version = VERSIONS[v], .kept = true, .expiry = 3600, .reconnects = true};
        receivers[v] = device_with(formatted("receiver-%d", v), options);
        senders[v] = device_with(formatted("sender-%d", v), options);
        topics[v] = formatted("again/%d", v);
        subscribe(receivers[v], topics[v], 2);
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < EACH; i++)
            for (int v = 0; v < 2; v++) EQUAL(offer(senders[v], topics[v], formatted("%d", round * EACH + i), 2), 0);
        /* What the library sends again after a cut in the middle of this is at times malformed; receiving goes on. */
        for (int v = 0; v < 2; v++) all_are_acknowledged(senders[v]);
        cut(false);
        for (int v = 0; v < 2; v++)
            AWAIT(receivers[v]->connections == round + 2 && senders[v]->connections == round + 2);
    }
    for (int v = 0; v < 2; v++) {
        bool seen[ALL] = {false};
        for (int i = 0; i < ALL; i++) {
            Message *got = next(receivers[v]);
            int which = atoi(strndup(got->message->payload, got->message->payloadlen));
            if (seen[which]) fail(__LINE__, "%d has come twice", which);
            seen[which] = true;
        }
        nothing(receivers[v]);
        EQUAL(receivers[v]->lost, ROUNDS);
        EQUAL(senders[v]->lost, ROUNDS);
    }
}

static const struct {
    const char *name;
    void (*check)(void);
} CHECKS[] = {
#define CHECK(name) {#name, name}
    CHECK(everything_arrives_once_in_order),
    CHECK(quality_of_service_is_the_lower_of_both),
    CHECK(sessions_are_kept),
    CHECK(sessions_expire),
    CHECK(retained_messages),
    CHECK(wills_are_sent),
    CHECK(a_will_may_be_delayed),
    CHECK(properties_travel),
    CHECK(messages_expire),
    CHECK(request_and_response),
    CHECK(aliases_both_ways),
    CHECK(receive_maximum_is_kept),
    CHECK(server_keep_alive),
    CHECK(reason_codes),
    CHECK(many_filters_have_a_code_each),
    CHECK(bad_tokens_are_refused),
    CHECK(taken_over),
    CHECK(subscription_options),
    CHECK(shared_subscriptions),
    CHECK(over_another_transport),
    CHECK(lost_connections_are_made_again),
};

int main(int count, char **arguments) {
    const char *name = count > 1 ? arguments[1] : "";
    uri = count > 2 ? arguments[2] : NULL;
    ca = count > 3 ? arguments[3] : NULL;
    for (size_t i = 0; i < sizeof CHECKS / sizeof *CHECKS; i++) {
        if (!strcmp(name, "list")) puts(CHECKS[i].name);
        if (uri && !strcmp(name, CHECKS[i].name)) {
            CHECKS[i].check();
            printf("ok %s\n", name);
            fflush(stdout);
            /* The library's threads end with the process. */
            _exit(0);
        }
    }
    if (!strcmp(name, "list")) return 0;
    fprintf(stderr, "usage: paho_checks NAME URI [CA] | list\n");
    return 2;
}
