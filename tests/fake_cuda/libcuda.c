/* A libcuda.so.1 without a GPU, for tests: "device memory" lies in files that stand for the GPU's memory.
 *
 * What stands for the hardware is a directory D: where /dev/nvidiactl is a directory (in a sandbox) D is /dev, else it
 * is `dev` beside this library.
 *
 *   D/nvidia0, D/nvidia1, ...   one GPU each: `info` (lines "name TEXT", "uuid HEX", "memory BYTES"), and a file
 *                               mem-XXXXXX per process and GPU that is used. Its size is what the process has of the
 *                               GPU; its flock says that the process lives. A file without one is swept, as a GPU
 *                               forgets what a dead process had.
 *   D/nvidiactl/config          read at every call: "version 13000", "context BYTES", "lossy 1" (a checkpoint saves
 *                               nothing), "shared 1" (it saves into shared memory), "scratch BYTES" (what NVML tells
 *                               of a process beside what is saved), "hidden 1" (NVML
 *                               lists no process: in a container it has other pids for them), "map 1" (a map of GPUs may name those alone that
 *                               the process can reach; else it must name all of the machine),
 *                               "fault CALL ACTION [FIRST [TIMES]]" with ACTION fail=CODE, late=CODE (done, then an
 *                               error), broken=CODE (an error, and the process is FAILED), sleep=MS, hang, kill.
 *                               FIRST counts from 1, over all processes. "rate BYTES": what is saved and put back in a
 *                               second at most.
 *   D/nvidia0/health            what NVML says of a GPU: "ecc COUNT", "pending 1", "failed 1", "retired 1", "lost 1",
 *                               "reset 1", "hang 1"
 *   D/nvidiactl/xids            lines "MINOR XID", appended: errors that NVML reports to whoever waits for them
 *   D/nvidia-uvm                held open, as the real one is
 *
 * A process that is not CHECKPOINTED holds these files open, from cuInit on. When it is dumped all the same and comes
 * back, it is not the process that the GPU knew: its memory is gone, and every call says so.
 *
 * As strict as the real one where that is known: cuInit writes its thread's name below /proc and makes a memfd; it
 * reserves addresses that a restored process must still have; what was mapped of a GPU goes at a checkpoint and comes
 * back at its own addresses, which must be free; who makes the checkpoint calls must have called cuInit and may look
 * into the target. A process without CUDA is CUDA_ERROR_NOT_INITIALIZED, no process CUDA_ERROR_INVALID_VALUE.
 *
 * The controlling process finds the target's helper thread by a Unix socket: in the target's /tmp if that is in a
 * sandbox, which has a network of its own, and else an abstract one, of which nothing is left whoever kills the target.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct { unsigned char bytes[16]; } CUuuid;
typedef struct { unsigned timeoutMs, reserved0; uint64_t reserved1[7]; } CUcheckpointLockArgs;
typedef struct { CUuuid oldUuid, newUuid; } CUcheckpointGpuPair;
typedef struct { CUcheckpointGpuPair *gpuPairs; unsigned gpuPairsCount, padding0; char reserved[48]; }
    CUcheckpointRestoreArgs;
_Static_assert(sizeof(CUcheckpointLockArgs) == 64 && sizeof(CUcheckpointRestoreArgs) == 64, "as in cuda.h");

enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201, OPERATING_SYSTEM = 304, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709, NOT_SUPPORTED = 801, UNKNOWN = 999,
};
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };

#define MAX_GPUS 16
#define MAX_BLOCKS 4096
#define MAX_PINNED 64
#define BASE 0x700000000000ULL
#define PER_GPU (1ULL << 40)
#define WINDOW (2UL << 20)
#define RESERVED_AT ((void *)0x200000000UL)
#define RESERVED 8592031744UL

struct gpu { int minor; char name[96]; CUuuid uuid; uint64_t memory; };
struct block { uint64_t offset, size; };
struct device {
    struct gpu gpu;
    int fd;
    char path[300];
    uint64_t size;
    struct block blocks[MAX_BLOCKS];
    int count, contexts;
    char *saved;
    void *page, *place;
};
struct pinned { uintptr_t at; size_t size; int ours; };
struct context { int device; };

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int ready, forked, lost, stuck, state, locked, active, count, ctl, uvm, tid, pipe[2];
    uint64_t born;
    char *reservation;
    struct device devices[MAX_GPUS];
    struct pinned pinned[MAX_PINNED];
} P = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .ctl = -1, .uvm = -1};
static __thread struct context *stack[32];
static __thread int depth, late;

/* ------------------------------------------------------------------------------------------------- the hardware */

static int in_sandbox(const char *root_path)
{
    char path[96];
    struct stat st;
    snprintf(path, sizeof path, "%s/dev/nvidiactl", root_path);
    return !stat(path, &st) && S_ISDIR(st.st_mode);
}

static const char *root(void)
{
    static char path[256];
    if (in_sandbox(""))
        return "/dev";
    if (!path[0]) {
        Dl_info info;
        dladdr((void *)root, &info);
        snprintf(path, sizeof path, "%s", info.dli_fname);
        char *slash = strrchr(path, '/');
        snprintf(slash ? slash : path, 8, "%s", "/dev");
    }
    return path;
}

static char *slurp(const char *path)
{
    static __thread char text[8192];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    return text;
}

static char *config(void)
{
    char path[300];
    snprintf(path, sizeof path, "%s/nvidiactl/config", root());
    return slurp(path);
}

static uint64_t number(const char *key, uint64_t otherwise)
{
    size_t n = strlen(key);
    for (char *line = config(); line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (!strncmp(line, key, n) && line[n] == ' ')
            return strtoull(line + n, NULL, 0);
    return otherwise;
}

static int by_minor(const void *a, const void *b)
{
    return ((const struct gpu *)a)->minor - ((const struct gpu *)b)->minor;
}

static int scan(struct gpu *found)
{
    int count = 0;
    DIR *d = opendir(root());
    for (struct dirent *e; d && (e = readdir(d)) && count < MAX_GPUS;) {
        int minor, end = 0;
        if (sscanf(e->d_name, "nvidia%d%n", &minor, &end) != 1 || e->d_name[end])
            continue;
        char path[600];
        snprintf(path, sizeof path, "%s/%s/info", root(), e->d_name);
        struct gpu g = {.minor = minor};
        char *save = NULL;
        for (char *line = strtok_r(slurp(path), "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
            if (!strncmp(line, "name ", 5))
                snprintf(g.name, sizeof g.name, "%s", line + 5);
            else if (!strncmp(line, "memory ", 7))
                g.memory = strtoull(line + 7, NULL, 0);
            else if (!strncmp(line, "uuid ", 5))
                for (int i = 0; i < 16; i++)
                    sscanf(line + 5 + 2 * i, "%2hhx", &g.uuid.bytes[i]);
        }
        if (g.memory)
            found[count++] = g;
    }
    if (d)
        closedir(d);
    qsort(found, (size_t)count, sizeof *found, by_minor);
    return count;
}

/* What a GPU has given away; what dead processes had is taken back. */
static uint64_t used(const struct gpu *g)
{
    uint64_t sum = 0;
    char folder[300], path[600];
    snprintf(folder, sizeof folder, "%s/nvidia%d", root(), g->minor);
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (strncmp(e->d_name, "mem-", 4))
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        struct stat st;
        if (fd < 0)
            continue;
        if (!flock(fd, LOCK_EX | LOCK_NB))
            unlink(path);
        else if (!fstat(fd, &st))
            sum += (uint64_t)st.st_size;
        close(fd);
    }
    if (d)
        closedir(d);
    return sum;
}

static int hardware_lock(const struct gpu *g)
{
    char path[300];
    snprintf(path, sizeof path, "%s/nvidia%d/lock", root(), g->minor);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd >= 0) {
        fchmod(fd, 0666);
        flock(fd, LOCK_EX);
    }
    return fd;
}

static int resize(struct device *d, uint64_t size)
{
    if (size > d->size) {
        int lock = hardware_lock(&d->gpu);
        int full = used(&d->gpu) + size - d->size > d->gpu.memory;
        int failed = full || ftruncate(d->fd, (off_t)size);
        if (lock >= 0)
            close(lock);
        if (failed)
            return OUT_OF_MEMORY;
    } else if (ftruncate(d->fd, (off_t)size))
        return UNKNOWN;
    d->size = size;
    return OK;
}

static int open_shared(void)
{
    char path[400];
    snprintf(path, sizeof path, "%s/nvidiactl/config", root());
    if (P.ctl < 0)
        P.ctl = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "%s/nvidia-uvm", root());
    if (P.uvm < 0)
        P.uvm = open(path, O_RDONLY | O_CLOEXEC);
    return P.ctl < 0 || P.uvm < 0 ? OPERATING_SYSTEM : OK;
}

static void close_shared(void)
{
    close(P.ctl);
    close(P.uvm);
    P.ctl = P.uvm = -1;
}

static int hold(struct device *d, uint64_t size)
{
    snprintf(d->path, sizeof d->path, "%s/nvidia%d/mem-XXXXXX", root(), d->gpu.minor);
    d->fd = mkostemp(d->path, O_CLOEXEC);
    if (d->fd < 0)
        return OPERATING_SYSTEM;
    fchmod(d->fd, 0666);
    flock(d->fd, LOCK_EX);
    d->size = 0;
    int result = resize(d, size);
    if (result) {
        close(d->fd);
        d->fd = -1;
        unlink(d->path);
        return result;
    }
    /* The real one takes its addresses back whatever is there by now. */
    d->page = mmap(d->place, WINDOW, PROT_READ, MAP_SHARED | (d->place ? MAP_FIXED_NOREPLACE : 0), d->fd, 0);
    if (d->page == MAP_FAILED) {
        d->page = NULL;
        return OPERATING_SYSTEM;
    }
    d->place = d->page;
    return OK;
}

static void let_go(struct device *d)
{
    if (d->page)
        munmap(d->page, WINDOW);
    d->page = NULL;
    if (d->fd >= 0) {
        unlink(d->path);
        close(d->fd);
    }
    d->fd = -1;
}

/* ------------------------------------------------------------------------------------------------------- faults */

static int counted(const char *call)
{
    char path[300], text[24] = "";
    snprintf(path, sizeof path, "%s/nvidiactl/count-%s", root(), call);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return 1;
    fchmod(fd, 0666);
    flock(fd, LOCK_EX);
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    int count = (n > 0 ? atoi(text) : 0) + 1;
    int length = snprintf(text, sizeof text, "%d", count);
    if (pwrite(fd, text, (size_t)length, 0) != length)
        count = 1;
    close(fd);
    return count;
}

static int fault(const char *call)
{
    late = OK;
    char *text = config(), *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char name[64], action[64];
        int first = 1, times = 1 << 30;
        if (sscanf(line, "fault %63s %63s %d %d", name, action, &first, &times) < 2 || strcmp(name, call))
            continue;
        int n = counted(call);
        if (n < first || n >= first + times)
            continue;
        if (!strncmp(action, "fail=", 5))
            return atoi(action + 5);
        if (!strncmp(action, "late=", 5))
            late = atoi(action + 5);
        if (!strncmp(action, "sleep=", 6))
            usleep((useconds_t)atoi(action + 6) * 1000);
        if (!strncmp(action, "broken=", 7)) {
            P.state = FAILED;
            return atoi(action + 7);
        }
        if (!strcmp(action, "kill"))
            raise(SIGKILL);
        while (!strcmp(action, "hang"))
            pause();
        return OK;
    }
    return OK;
}

static int done(int result)
{
    return result ? result : late;
}

/* ----------------------------------------------------------------------------------------------- inside a process */

static uint64_t birth(void)
{
    char *at = strrchr(slurp("/proc/self/stat"), ')');
    for (int i = 0; at && i < 20; i++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

/* Every call of the program goes in here, and waits while the process is locked. */
static int enter(const char *call)
{
    if (P.forked || !P.ready)
        return NOT_INITIALIZED;
    pthread_mutex_lock(&P.mutex);
    while (P.locked)
        pthread_cond_wait(&P.changed, &P.mutex);
    P.active++;
    if (!P.lost && birth() != P.born)
        P.lost = 1;
    int lost = P.lost;
    pthread_mutex_unlock(&P.mutex);
    int result = lost ? CONTEXT_IS_DESTROYED : fault(call);
    if (result) {
        pthread_mutex_lock(&P.mutex);
        P.active--;
        pthread_cond_broadcast(&P.changed);
        pthread_mutex_unlock(&P.mutex);
    }
    return result;
}

static int leave(int result)
{
    pthread_mutex_lock(&P.mutex);
    P.active--;
    pthread_cond_broadcast(&P.changed);
    pthread_mutex_unlock(&P.mutex);
    return done(result);
}

#define ENTER(call) do { int r_ = enter(call); if (r_) return r_; } while (0)
/* Of calls that work in the thread's current context: each thread begins with none. */
#define ENTER_CONTEXT(call) do { ENTER(call); if (!depth || !stack[depth - 1]) return leave(INVALID_CONTEXT); } while (0)

struct pair { CUuuid from, to; };
struct order { int op; unsigned timeout, pairs, pad; struct pair pair[MAX_GPUS]; };
struct answer { int result, state, tid, pad; };
enum { GET_STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK };

static int do_lock(unsigned timeout)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += timeout / 1000;
    end.tv_nsec += (timeout % 1000) * 1000000L;
    if (end.tv_nsec >= 1000000000L) {
        end.tv_nsec -= 1000000000L;
        end.tv_sec++;
    }
    P.locked = 1;
    while (P.active) {
        int e = timeout ? pthread_cond_timedwait(&P.changed, &P.mutex, &end) : pthread_cond_wait(&P.changed, &P.mutex);
        if (e == ETIMEDOUT && P.active) {
            P.locked = 0;
            pthread_cond_broadcast(&P.changed);
            return NOT_READY;
        }
    }
    P.state = LOCKED;
    return OK;
}

/* How long the GPU's memory takes, where the configuration says so. */
static void take_time(void)
{
    uint64_t rate = number("rate", 0), sum = 0;
    for (int i = 0; i < P.count; i++)
        sum += P.devices[i].fd >= 0 || P.devices[i].saved ? P.devices[i].size : 0;
    if (rate)
        usleep((useconds_t)(sum * 1000 / rate * 1000));
}

static int do_checkpoint(void)
{
    int lossy = (int)number("lossy", 0);
    take_time();
    for (int i = 0; i < P.count; i++) {
        struct device *d = &P.devices[i];
        if (d->fd < 0)
            continue;
        int kind = number("shared", 0) ? MAP_SHARED : MAP_PRIVATE;
        d->saved = mmap(NULL, d->size + 4096, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS, -1, 0);
        if (d->saved == MAP_FAILED) {
            d->saved = NULL;
            return OPERATING_SYSTEM;
        }
        for (uint64_t at = 0; at < d->size && !lossy;) {
            ssize_t n = pread(d->fd, d->saved + at, d->size - at, (off_t)at);
            if (n <= 0)
                return UNKNOWN;
            at += (uint64_t)n;
        }
        d->saved[d->size] = 1;
    }
    for (int i = 0; i < P.count; i++)
        if (P.devices[i].fd >= 0)
            let_go(&P.devices[i]);
    close_shared();
    P.state = CHECKPOINTED;
    return OK;
}

static int put_back(struct device *d, const struct order *o, const struct gpu *here, int count)
{
    CUuuid wanted = d->gpu.uuid;
    for (unsigned i = 0; i < o->pairs; i++)
        if (!memcmp(&o->pair[i].from, &d->gpu.uuid, 16))
            wanted = o->pair[i].to;
    const struct gpu *g = NULL;
    for (int i = 0; i < count; i++)
        if (!memcmp(&here[i].uuid, &wanted, 16))
            g = &here[i];
    if (!g)
        return NO_DEVICE;
    if (strcmp(g->name, d->gpu.name))
        return INVALID_DEVICE;
    d->gpu = *g;
    if (!d->saved)
        return OK;
    uint64_t size = d->size;
    int result = hold(d, size);
    for (uint64_t at = 0; !result && at < size;) {
        ssize_t n = pwrite(d->fd, d->saved + at, size - at, (off_t)at);
        if (n <= 0)
            return UNKNOWN;
        at += (uint64_t)n;
    }
    d->size = size;
    return result;
}

/* As NVIDIA's kernel module does it, by pin_user_pages with the memory map locked: such a fault cannot wait for whoever
 * serves a userfaultfd, and fails. */
static int pin(uintptr_t at, size_t size)
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    char line[512];
    uintptr_t begin = 0, end = 0, next;
    int failed = !smaps || pagemap < 0;
    while (!failed && fgets(line, sizeof line, smaps)) {
        uintptr_t other;
        if (sscanf(line, "%lx-%lx ", &next, &other) == 2)
            begin = next, end = other;
        if (strncmp(line, "VmFlags:", 8) || !strstr(line, " um"))
            continue;
        uintptr_t last = end < at + size ? end : at + size;
        for (uintptr_t page = (begin > at ? begin : at) & ~4095UL; page < last && !failed; page += 4096) {
            uint64_t entry;
            failed = pread(pagemap, &entry, sizeof entry, (off_t)(page / 4096 * sizeof entry)) != sizeof entry
                     || !(entry >> 62);
        }
    }
    if (smaps)
        fclose(smaps);
    if (pagemap >= 0)
        close(pagemap);
    return failed ? OPERATING_SYSTEM : OK;
}

/* Whether the process still is what it was beside the GPU's memory. */
static int whole(void)
{
    unsigned char byte = 'x', there;
    char *last = P.reservation + RESERVED - 4096;
    if (mincore(P.reservation, 4096, &there) || mincore(last, 4096, &there))
        return OPERATING_SYSTEM;
    return write(P.pipe[1], &byte, 1) == 1 && read(P.pipe[0], &byte, 1) == 1 && byte == 'x' ? OK : OPERATING_SYSTEM;
}

static int do_restore(const struct order *o)
{
    struct gpu here[MAX_GPUS];
    int count = scan(here), stuck = P.stuck || whole() || open_shared();
    take_time();
    for (int i = 0; i < MAX_PINNED && !stuck; i++)
        stuck = P.pinned[i].size ? pin(P.pinned[i].at, P.pinned[i].size) : OK;
    /* As with the real one: what failed here never comes back, and says so in this way. */
    if ((P.stuck = stuck))
        return OPERATING_SYSTEM;
    P.born = birth();
    for (int i = 0; i < P.count; i++) {
        struct device *d = &P.devices[i];
        int unused = !d->saved, result = put_back(d, o, here, count);
        if (result && !(unused && (result == NO_DEVICE || result == INVALID_DEVICE))) {
            P.stuck = 1;
            return result;
        }
    }
    for (int i = 0; i < P.count; i++)
        if (P.devices[i].saved) {
            munmap(P.devices[i].saved, P.devices[i].size + 4096);
            P.devices[i].saved = NULL;
        }
    P.state = LOCKED;
    return OK;
}

static int obey(const struct order *o)
{
    static const char *names[] = {"target.state", "target.lock", "target.checkpoint", "target.restore",
                                  "target.unlock"};
    int result = fault(names[o->op]);
    if (result)
        return result;
    static const int needed[] = {0, RUNNING, LOCKED, CHECKPOINTED, LOCKED};
    pthread_mutex_lock(&P.mutex);
    if (o->op != GET_STATE && P.state != needed[o->op])
        result = ILLEGAL_STATE;
    else if (o->op == LOCK)
        result = do_lock(o->timeout);
    else if (o->op == CHECKPOINT)
        result = do_checkpoint();
    else if (o->op == RESTORE)
        result = do_restore(o);
    else if (o->op == UNLOCK) {
        P.state = RUNNING;
        P.locked = 0;
        pthread_cond_broadcast(&P.changed);
    }
    pthread_mutex_unlock(&P.mutex);
    return done(result);
}

static void socket_name(struct sockaddr_un *at, const char *root_path, long pid)
{
    *at = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (in_sandbox(root_path))
        snprintf(at->sun_path, sizeof at->sun_path, "%s/tmp/.fake-cuda-%ld", root_path, pid);
    else
        snprintf(at->sun_path + 1, sizeof at->sun_path - 1, "fake-cuda-%ld", pid);
}

static void *helper(void *argument)
{
    int listener = (int)(intptr_t)argument;
    P.tid = (int)syscall(SYS_gettid);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        struct order o;
        if (recv(fd, &o, sizeof o, MSG_WAITALL) == sizeof o && o.op >= 0 && o.op <= UNLOCK && o.pairs <= MAX_GPUS) {
            struct answer a = {.result = obey(&o)};
            a.state = P.state;
            a.tid = P.tid;
            send(fd, &a, sizeof a, MSG_NOSIGNAL);
        }
        close(fd);
    }
    return NULL;
}

static void in_child(void)
{
    P.forked = 1;
}

static int visible(const struct gpu *g, int ordinal, const char *wish)
{
    if (!wish)
        return 1;
    char text[64] = "GPU-", *at = text + 4, list[1024], *save = NULL;
    for (int i = 0; i < 16; i++)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", g->uuid.bytes[i]);
    snprintf(list, sizeof list, "%s", wish);
    for (char *word = strtok_r(list, ",", &save); word; word = strtok_r(NULL, ",", &save))
        if (!strncmp(word, "GPU-", 4) ? !strncmp(text, word, strlen(word)) : atoi(word) == ordinal)
            return 1;
    return 0;
}

/* What cuInit needs of the system beside the device nodes. */
static int set_up(void)
{
    int memory = (int)syscall(SYS_memfd_create, "cuda", 0);
    if (memory < 0 || pipe2(P.pipe, O_CLOEXEC))
        return OPERATING_SYSTEM;
    close(memory);
    P.reservation = mmap(RESERVED_AT, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return P.reservation == MAP_FAILED ? OUT_OF_MEMORY : open_shared();
}

static int name_thread(pthread_t thread)
{
    char path[64], name[16];
    while (!*(volatile int *)&P.tid)
        usleep(100);
    snprintf(path, sizeof path, "/proc/self/task/%d/comm", P.tid);
    snprintf(name, sizeof name, "cuda%011lx", (unsigned long)thread & 0xfffffffffffUL);
    int fd = open(path, O_WRONLY | O_CLOEXEC), failed = fd < 0 || write(fd, name, 15) != 15;
    if (fd >= 0)
        close(fd);
    return failed ? OPERATING_SYSTEM : OK;
}

/* ------------------------------------------------------------------------------------------------- the driver API */

CUresult cuInit(unsigned flags)
{
    if (flags)
        return INVALID_VALUE;
    int result = fault("cuInit");
    if (result)
        return result;
    pthread_mutex_lock(&P.mutex);
    if (!P.ready && !P.forked) {
        struct gpu all[MAX_GPUS];
        int count = scan(all);
        P.count = 0;
        for (int i = 0; i < count; i++)
            if (visible(&all[i], i, getenv("CUDA_VISIBLE_DEVICES"))) {
                P.devices[P.count].gpu = all[i];
                P.devices[P.count++].fd = -1;
            }
        struct sockaddr_un at;
        socket_name(&at, "", syscall(SYS_getpid));
        unlink(at.sun_path);
        int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        pthread_t thread;
        sigset_t all_signals, before;
        sigfillset(&all_signals);
        P.tid = 0;
        if (!P.count)
            result = NO_DEVICE;
        else if (set_up() || listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 8))
            result = OPERATING_SYSTEM;
        else {
            pthread_sigmask(SIG_SETMASK, &all_signals, &before);
            result = pthread_create(&thread, NULL, helper, (void *)(intptr_t)listener) ? OPERATING_SYSTEM
                                                                                       : name_thread(thread);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
            pthread_atfork(NULL, NULL, in_child);
        }
        if (result && listener >= 0)
            close(listener);
        P.born = birth();
        P.ready = !result;
    }
    pthread_mutex_unlock(&P.mutex);
    return P.forked ? NOT_INITIALIZED : done(result);
}

__attribute__((destructor)) static void tidy(void)
{
    struct sockaddr_un at;
    socket_name(&at, "", syscall(SYS_getpid));
    if (P.ready && !P.forked) {
        unlink(at.sun_path);
        for (int i = 0; i < P.count; i++)
            if (P.devices[i].fd >= 0)
                unlink(P.devices[i].path);
    }
}

CUresult cuDriverGetVersion(int *version)
{
    *version = (int)number("version", 13000);
    return OK;
}

CUresult cuDeviceGetCount(int *count)
{
    ENTER("cuDeviceGetCount");
    *count = P.count;
    return leave(OK);
}

static struct device *device(CUdevice d)
{
    return d >= 0 && d < P.count ? &P.devices[d] : NULL;
}

CUresult cuDeviceGet(CUdevice *d, int ordinal)
{
    ENTER("cuDeviceGet");
    *d = ordinal;
    return leave(device(ordinal) ? OK : INVALID_DEVICE);
}

CUresult cuDeviceGetName(char *name, int size, CUdevice d)
{
    ENTER("cuDeviceGetName");
    if (device(d))
        snprintf(name, (size_t)size, "%s", device(d)->gpu.name);
    return leave(device(d) ? OK : INVALID_DEVICE);
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice d)
{
    ENTER("cuDeviceGetUuid");
    if (device(d))
        *uuid = device(d)->gpu.uuid;
    return leave(device(d) ? OK : INVALID_DEVICE);
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice d) { return cuDeviceGetUuid_v2(uuid, d); }

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d)
{
    ENTER("cuDeviceTotalMem");
    if (device(d))
        *bytes = device(d)->gpu.memory;
    return leave(device(d) ? OK : INVALID_DEVICE);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice d)
{
    ENTER("cuDeviceGetAttribute");
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return leave(device(d) ? OK : INVALID_DEVICE);
}

static int add_context(int d)
{
    if (!device(d))
        return INVALID_DEVICE;
    if (P.devices[d].fd < 0) {
        uint64_t size = number("context", 1 << 20);
        int result = hold(&P.devices[d], size);
        if (result)
            return result;
        P.devices[d].blocks[0] = (struct block){0, size};
        P.devices[d].count = 1;
    }
    P.devices[d].contexts++;
    return OK;
}

static void drop_context(int d)
{
    if (!--P.devices[d].contexts) {
        let_go(&P.devices[d]);
        P.devices[d].count = 0;
    }
}

static struct context primary[MAX_GPUS];

CUresult cuCtxCreate_v2(struct context **context, unsigned flags, CUdevice d)
{
    (void)flags;
    ENTER("cuCtxCreate");
    int result = depth < 32 ? add_context(d) : INVALID_VALUE;
    if (!result) {
        *context = malloc(sizeof **context);
        (*context)->device = d;
        stack[depth++] = *context;
    }
    return leave(result);
}

CUresult cuCtxCreate_v4(struct context **context, void *params, unsigned flags, CUdevice d)
{
    (void)params;
    return cuCtxCreate_v2(context, flags, d);
}

CUresult cuCtxDestroy_v2(struct context *context)
{
    ENTER("cuCtxDestroy");
    drop_context(context->device);
    if (depth && stack[depth - 1] == context)
        depth--;
    free(context);
    return leave(OK);
}

CUresult cuDevicePrimaryCtxRetain(struct context **context, CUdevice d)
{
    ENTER("cuDevicePrimaryCtxRetain");
    int result = add_context(d);
    if (!result) {
        primary[d].device = d;
        *context = &primary[d];
    }
    return leave(result);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d)
{
    ENTER("cuDevicePrimaryCtxRelease");
    if (device(d))
        drop_context(d);
    return leave(device(d) ? OK : INVALID_DEVICE);
}

CUresult cuCtxSetCurrent(struct context *context)
{
    ENTER("cuCtxSetCurrent");
    if (!depth)
        depth = 1;
    stack[depth - 1] = context;
    return leave(OK);
}

CUresult cuCtxGetCurrent(struct context **context)
{
    ENTER("cuCtxGetCurrent");
    *context = depth ? stack[depth - 1] : NULL;
    return leave(OK);
}

CUresult cuCtxPushCurrent_v2(struct context *context)
{
    ENTER("cuCtxPushCurrent");
    if (depth < 32)
        stack[depth++] = context;
    return leave(OK);
}

CUresult cuCtxPopCurrent_v2(struct context **context)
{
    ENTER("cuCtxPopCurrent");
    if (!depth)
        return leave(INVALID_CONTEXT);
    struct context *top = stack[--depth];
    if (context)
        *context = top;
    return leave(OK);
}

static struct device *current(void)
{
    return depth && stack[depth - 1] ? &P.devices[stack[depth - 1]->device] : NULL;
}

CUresult cuCtxGetDevice(CUdevice *d)
{
    ENTER("cuCtxGetDevice");
    if (current())
        *d = (int)(current() - P.devices);
    return leave(current() ? OK : INVALID_CONTEXT);
}

CUresult cuCtxSynchronize(void)
{
    ENTER("cuCtxSynchronize");
    return leave(current() ? OK : INVALID_CONTEXT);
}

CUresult cuMemGetInfo_v2(size_t *unused, size_t *total)
{
    ENTER("cuMemGetInfo");
    struct device *d = current();
    if (d) {
        uint64_t taken = used(&d->gpu);
        *total = d->gpu.memory;
        *unused = taken < d->gpu.memory ? d->gpu.memory - taken : 0;
    }
    return leave(d ? OK : INVALID_CONTEXT);
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size)
{
    ENTER("cuMemAlloc");
    struct device *d = current();
    if (!d || !size)
        return leave(d ? INVALID_VALUE : INVALID_CONTEXT);
    size = (size + 511) & ~511UL;
    pthread_mutex_lock(&P.mutex);
    int i = 1, result = OK;
    uint64_t at = 0;
    for (;; i++) {
        at = d->blocks[i - 1].offset + d->blocks[i - 1].size;
        if (i >= d->count || d->blocks[i].offset - at >= size)
            break;
    }
    if (d->count == MAX_BLOCKS)
        result = OUT_OF_MEMORY;
    else if (i >= d->count)
        result = resize(d, at + size);
    if (!result) {
        memmove(&d->blocks[i + 1], &d->blocks[i], (size_t)(d->count - i) * sizeof d->blocks[0]);
        d->blocks[i] = (struct block){at, size};
        d->count++;
        *pointer = BASE + (uint64_t)(d - P.devices) * PER_GPU + at;
    }
    pthread_mutex_unlock(&P.mutex);
    return leave(result);
}

static struct device *owner(CUdeviceptr p, size_t size, uint64_t *offset)
{
    if (p < BASE || (p - BASE) / PER_GPU >= (uint64_t)P.count)
        return NULL;
    struct device *d = &P.devices[(p - BASE) / PER_GPU];
    *offset = (p - BASE) % PER_GPU;
    for (int i = 1; i < d->count; i++)
        if (*offset >= d->blocks[i].offset && *offset + size <= d->blocks[i].offset + d->blocks[i].size)
            return d;
    return NULL;
}

CUresult cuMemFree_v2(CUdeviceptr p)
{
    ENTER_CONTEXT("cuMemFree");
    uint64_t offset;
    pthread_mutex_lock(&P.mutex);
    struct device *d = owner(p, 0, &offset);
    int found = 0;
    for (int i = 1; d && !found && i < d->count; i++)
        if (d->blocks[i].offset == offset) {
            memmove(&d->blocks[i], &d->blocks[i + 1], (size_t)(d->count - i - 1) * sizeof d->blocks[0]);
            d->count--;
            struct block *last = &d->blocks[d->count - 1];
            resize(d, last->offset + last->size);
            found = 1;
        }
    pthread_mutex_unlock(&P.mutex);
    return leave(found ? OK : INVALID_VALUE);
}

static int move(CUdeviceptr p, char *host, size_t size, int to_device)
{
    uint64_t offset;
    struct device *d = owner(p, size, &offset);
    if (!d)
        return INVALID_VALUE;
    for (size_t at = 0; at < size;) {
        ssize_t n = to_device ? pwrite(d->fd, host + at, size - at, (off_t)(offset + at))
                              : pread(d->fd, host + at, size - at, (off_t)(offset + at));
        if (n <= 0)
            return UNKNOWN;
        at += (size_t)n;
    }
    return OK;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size)
{
    ENTER_CONTEXT("cuMemcpyHtoD");
    return leave(move(to, (char *)from, size, 1));
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size)
{
    ENTER_CONTEXT("cuMemcpyDtoH");
    return leave(move(from, to, size, 0));
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size)
{
    ENTER_CONTEXT("cuMemcpyDtoD");
    char *buffer = malloc(size ? size : 1);
    int result = move(from, buffer, size, 0);
    if (!result)
        result = move(to, buffer, size, 1);
    free(buffer);
    return leave(result);
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count)
{
    ENTER_CONTEXT("cuMemsetD8");
    char *buffer = malloc(count ? count : 1);
    memset(buffer, value, count);
    int result = move(to, buffer, count, 1);
    free(buffer);
    return leave(result);
}

/* Page-locked memory is only remembered, and a stream's work is done when it is given: what copies come to is right, how
 * they overlap is not shown. */
static int add_pinned(void *p, size_t size, int ours)
{
    int result = pin((uintptr_t)p, size);
    pthread_mutex_lock(&P.mutex);
    for (int i = 0; i < MAX_PINNED && !result; i++)
        if (!P.pinned[i].size) {
            P.pinned[i] = (struct pinned){(uintptr_t)p, size, ours};
            break;
        }
    pthread_mutex_unlock(&P.mutex);
    return result;
}

static size_t drop_pinned(void *p, int ours)
{
    size_t size = 0;
    pthread_mutex_lock(&P.mutex);
    for (int i = 0; i < MAX_PINNED && !size; i++)
        if (P.pinned[i].size && P.pinned[i].at == (uintptr_t)p && P.pinned[i].ours == ours) {
            size = P.pinned[i].size;
            P.pinned[i] = (struct pinned){0};
        }
    pthread_mutex_unlock(&P.mutex);
    return size;
}

CUresult cuMemHostAlloc(void **p, size_t size, unsigned flags)
{
    (void)flags;
    ENTER_CONTEXT("cuMemHostAlloc");
    /* Shared, as the real one's: "/dev/zero (deleted)" among the mappings. */
    *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return leave(*p == MAP_FAILED ? OUT_OF_MEMORY : add_pinned(*p, size, 1));
}

CUresult cuMemFreeHost(void *p)
{
    ENTER_CONTEXT("cuMemFreeHost");
    size_t size = drop_pinned(p, 1);
    return leave(size && !munmap(p, size) ? OK : INVALID_VALUE);
}

CUresult cuMemHostRegister_v2(void *p, size_t size, unsigned flags)
{
    (void)flags;
    ENTER_CONTEXT("cuMemHostRegister");
    return leave(p && size ? add_pinned(p, size, 0) : INVALID_VALUE);
}

CUresult cuMemHostUnregister(void *p)
{
    ENTER_CONTEXT("cuMemHostUnregister");
    return leave(drop_pinned(p, 0) ? OK : INVALID_VALUE);
}

CUresult cuStreamCreate(void **stream, unsigned flags)
{
    (void)flags;
    ENTER_CONTEXT("cuStreamCreate");
    *stream = malloc(1);
    return leave(OK);
}

CUresult cuStreamSynchronize(void *stream)
{
    (void)stream;
    ENTER("cuStreamSynchronize");
    return leave(OK);
}

CUresult cuStreamDestroy_v2(void *stream)
{
    ENTER("cuStreamDestroy");
    free(stream);
    return leave(OK);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream)
{
    (void)stream;
    ENTER_CONTEXT("cuMemcpyHtoDAsync");
    return leave(move(to, (char *)from, size, 1));
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream)
{
    (void)stream;
    ENTER_CONTEXT("cuMemcpyDtoHAsync");
    return leave(move(from, to, size, 0));
}

/* Not of the real API: work on the GPU that takes so long. */
CUresult fakeKernel(unsigned ms)
{
    ENTER("cuLaunchKernel");
    usleep(ms * 1000);
    return leave(OK);
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
    static const struct { int code; const char *name; } names[] = {
        {OK, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM"},
        {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {NOT_READY, "CUDA_ERROR_NOT_READY"}, {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED"},
        {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"}, {UNKNOWN, "CUDA_ERROR_UNKNOWN"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == error) {
            *name = names[i].name;
            return OK;
        }
    *name = NULL;
    return INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }

CUresult cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status)
{
    (void)flags;
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)root, &info))
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    char name[160];
    *found = NULL;
    for (int v = 4; self && !*found && v >= 1; v--) {
        if (v == 4 && version < 12050)
            continue;
        snprintf(name, sizeof name, v > 1 ? "%s_v%d" : "%s", symbol, v);
        *found = dlsym(self, name);
    }
    if (status)
        *status = *found ? 0 : 1;
    return *found ? OK : NOT_FOUND;
}

CUresult cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}

/* ---------------------------------------------------------------------------------------------- checkpoints */

#ifndef FAKE_CUDA_OLD

static int inner_pid(int pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    char *at = strstr(slurp(path), "\nNSpid:");
    if (!at)
        return -1;
    *strchr(at + 1, '\n') = 0;
    return atoi(strrchr(at, '\t') + 1);
}

static int ask(const char *call, int pid, struct order *o, struct answer *a)
{
    int result = P.ready && !P.forked ? fault(call) : NOT_INITIALIZED;
    if (result)
        return result;
    char where[64], link[64];
    snprintf(where, sizeof where, "/proc/%d/ns/pid", pid);
    if (readlink(where, link, sizeof link) < 0)
        return errno == ENOENT ? INVALID_VALUE : OPERATING_SYSTEM;
    snprintf(where, sizeof where, "/proc/%d/root", pid);
    struct sockaddr_un at;
    socket_name(&at, where, inner_pid(pid));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    result = NOT_INITIALIZED;
    if (!connect(fd, (struct sockaddr *)&at, sizeof at)) {
        result = OPERATING_SYSTEM;
        if (send(fd, o, sizeof *o, MSG_NOSIGNAL) == sizeof *o && recv(fd, a, sizeof *a, MSG_WAITALL) == sizeof *a)
            result = a->result;
    }
    close(fd);
    return done(result);
}

CUresult cuCheckpointProcessGetState(int pid, int *state)
{
    struct order o = {.op = GET_STATE};
    struct answer a = {0};
    int result = ask("cuCheckpointProcessGetState", pid, &o, &a);
    *state = a.state;
    return result;
}

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    struct order o = {.op = GET_STATE};
    struct answer a = {0};
    int result = ask("cuCheckpointProcessGetRestoreThreadId", pid, &o, &a);
    *tid = a.tid;
    return result;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args)
{
    struct order o = {.op = LOCK, .timeout = args ? args->timeoutMs : 0};
    struct answer a;
    return ask("cuCheckpointProcessLock", pid, &o, &a);
}

CUresult cuCheckpointProcessCheckpoint(int pid, void *args)
{
    (void)args;
    struct order o = {.op = CHECKPOINT};
    struct answer a;
    return ask("cuCheckpointProcessCheckpoint", pid, &o, &a);
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    struct order o = {.op = RESTORE, .pairs = args ? args->gpuPairsCount : 0};
    struct answer a;
    struct gpu all[MAX_GPUS];
    int count = scan(all);
    if (o.pairs > MAX_GPUS || (o.pairs && number("version", 13000) < 13000))
        return INVALID_VALUE;
    for (unsigned i = 0; i < o.pairs; i++)
        o.pair[i] = (struct pair){args->gpuPairs[i].oldUuid, args->gpuPairs[i].newUuid};
    /* A map must name every GPU of the machine, once; or each of the process's own and no other. */
    if (number("map", 0) && o.pairs) {
        for (unsigned j = 0; j < o.pairs; j++) {
            int found = 0;
            for (int i = 0; i < count; i++) {
                char path[96];
                snprintf(path, sizeof path, "/proc/%d/root/dev/nvidia%d/info", pid, all[i].minor);
                found |= !access(path, F_OK) && !memcmp(&o.pair[j].to, &all[i].uuid, 16);
            }
            if (!found)
                return INVALID_VALUE;
        }
        count = 0;
    }
    for (int i = 0; o.pairs && i < count; i++) {
        int named = 0;
        for (unsigned j = 0; j < o.pairs; j++)
            named += !memcmp(&o.pair[j].to, &all[i].uuid, 16);
        if (named != 1)
            return INVALID_VALUE;
    }
    return ask("cuCheckpointProcessRestore", pid, &o, &a);
}

CUresult cuCheckpointProcessUnlock(int pid, void *args)
{
    (void)args;
    struct order o = {.op = UNLOCK};
    struct answer a;
    return ask("cuCheckpointProcessUnlock", pid, &o, &a);
}

#endif

/* ------------------------------------------------------------------------------- the few of NVML that are asked */

int nvmlInit_v2(void) { return fault("nvmlInit"); }
int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned size)
{
    snprintf(text, size, "%d.00.00", (int)number("driver", 580));
    return 0;
}

static unsigned long long health(const void *handle, const char *key)
{
    char path[300], name[32];
    unsigned long long value;
    snprintf(path, sizeof path, "%s/nvidia%d/health", root(), (int)(intptr_t)handle - 1);
    for (char *line = slurp(path); line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (sscanf(line, "%31s %llu", name, &value) == 2 && !strcmp(name, key))
            return value;
    return 0;
}

static int reach(const void *handle)
{
    while (health(handle, "hang"))
        usleep(10000);
    return health(handle, "lost") ? 15 : health(handle, "reset") ? 16 : 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    struct gpu all[MAX_GPUS];
    int count = scan(all);
    for (int i = 0; i < count; i++)
        if (visible(&all[i], i, uuid)) {
            *handle = (void *)(intptr_t)(all[i].minor + 1);
            return 0;
        }
    return 6;
}

int nvmlDeviceGetTotalEccErrors(void *handle, int kind, int counter, unsigned long long *errors)
{
    *errors = kind == 1 && counter == 0 ? health(handle, "ecc") : 0;
    return reach(handle);
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed)
{
    *corrected = *uncorrected = 0;
    *pending = (unsigned)health(handle, "pending");
    *failed = (unsigned)health(handle, "failed");
    return reach(handle);
}

int nvmlDeviceGetRetiredPagesPendingStatus(void *handle, int *pending)
{
    *pending = (int)health(handle, "retired");
    return reach(handle);
}

struct event_set { long at; };
struct event { void *device; unsigned long long kind, data; unsigned gpu_instance, compute_instance; };

static FILE *xids(void)
{
    char path[300];
    snprintf(path, sizeof path, "%s/nvidiactl/xids", root());
    return fopen(path, "re");
}

int nvmlEventSetCreate(struct event_set **set)
{
    *set = calloc(1, sizeof **set);
    FILE *file = xids();
    if (file) {
        fseek(file, 0, SEEK_END);
        (*set)->at = ftell(file);
        fclose(file);
    }
    return 0;
}

int nvmlDeviceRegisterEvents(void *handle, unsigned long long kinds, struct event_set *set)
{
    return handle && kinds == 8 && set ? 0 : 2;
}

int nvmlEventSetWait_v2(struct event_set *set, struct event *event, unsigned timeout)
{
    for (unsigned waited = 0; waited < timeout; waited += 20) {
        FILE *file = xids();
        int minor = 0, found = 0;
        if (file) {
            fseek(file, set->at, SEEK_SET);
            found = fscanf(file, "%d %llu\n", &minor, &event->data) == 2;
            set->at = found ? ftell(file) : set->at;
            fclose(file);
        }
        if (found) {
            event->device = (void *)(intptr_t)(minor + 1);
            event->kind = 8;
            return 0;
        }
        usleep(20000);
    }
    return 10;
}

int nvmlDeviceGetMinorNumber(void *handle, unsigned *minor)
{
    *minor = (unsigned)(intptr_t)handle - 1;
    return 0;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending)
{
    (void)handle;
    *now = *pending = (unsigned)number("mig", 0);
    return 0;
}

static int by_handle(void *handle, struct gpu *g)
{
    struct gpu all[MAX_GPUS];
    int count = scan(all);
    for (int i = 0; i < count; i++)
        if (all[i].minor == (int)(intptr_t)handle - 1) {
            *g = all[i];
            return 0;
        }
    return 2;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *info)
{
    struct gpu g;
    if (by_handle(handle, &g))
        return 2;
    info[0] = g.memory;
    info[2] = used(&g);
    info[1] = info[2] < g.memory ? g.memory - info[2] : 0;
    return 0;
}

struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *found)
{
    unsigned room = *count, n = 0;
    char path[600], line[256];
    *count = 0;
    if (number("hidden", 0))
        return 0;
    snprintf(path, sizeof path, "%s/nvidia%d", root(), (int)(intptr_t)handle - 1);
    FILE *locks = fopen("/proc/locks", "re");
    while (locks && fgets(line, sizeof line, locks)) {
        int pid;
        unsigned major, minor;
        unsigned long inode;
        if (sscanf(line, "%*d: FLOCK ADVISORY WRITE %d %x:%x:%lu", &pid, &major, &minor, &inode) != 4)
            continue;
        DIR *d = opendir(path);
        for (struct dirent *e; d && (e = readdir(d));) {
            struct stat st;
            if (strncmp(e->d_name, "mem-", 4) || fstatat(dirfd(d), e->d_name, &st, 0) || st.st_ino != inode)
                continue;
            if (n < room)
                found[n] = (struct process){(unsigned)pid, (uint64_t)st.st_size + number("scratch", 0), 0, 0};
            n++;
        }
        if (d)
            closedir(d);
    }
    if (locks)
        fclose(locks);
    *count = n;
    return n > room ? 7 : 0;
}
