/*
 * woodfrog-init: PID 1 of a sandbox.
 *
 *   woodfrog-init --control FD [--cgroup FD]... [--timens MONOTONIC BOOTTIME]
 *
 * The process the daemon starts is only a launcher: it clones PID 1 into new namespaces as its own *sibling*
 * (CLONE_PARENT), reports "launched" and exits. So PID 1 is the daemon's child, dies with it (PDEATHSIG), and no
 * process stands between them. PID 1 also exits when its control socket is closed, and the kernel then ends the
 * pid namespace, and with it every process, mount and network device of the sandbox.
 *
 * The control socket is SOCK_SEQPACKET. A message is a list of strings, each ended by a NUL; descriptors travel as
 * SCM_RIGHTS. A message too long for one packet is put into a memfd: the packet is then "memfd\0" and the memfd is
 * its first descriptor. Requests begin with a sequence number and a command:
 *
 *   SEQ ops (NAME ARG...)...                     mount and file operations, in order; see the table `operations`
 *   SEQ spawn UID GID CAPS FLAGS UMASK PID CWD STDIN STDOUT STDERR
 *             N (RESOURCE SOFT HARD)*N  N (TARGET SOURCE)*N  N ARGV*N  N ENV*N
 *   SEQ signal PID SIGNAL
 *   SEQ pidfd PID
 *   SEQ lastpid PID                              the next pid is a higher one
 *   SEQ ping
 *
 * and answers are "ok SEQ VALUE..." or "err SEQ ERRNO WHAT". Every child's end, also that of re-parented
 * processes, is told as "exit PID STATUS" (wait status). A malformed message is answered with err, never obeyed in part.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <net/route.h>
#include <arpa/inet.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <grp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

/* Kernel interfaces newer than the oldest libc we build with; the numbers are the same on every architecture. */
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_open_tree
#define SYS_open_tree 428
#endif
#ifndef SYS_move_mount
#define SYS_move_mount 429
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif

#define WF_OPEN_TREE_CLONE 1u
#define WF_MOVE_F_EMPTY_PATH 0x00000004u
#define WF_MOVE_T_EMPTY_PATH 0x00000040u
#define WF_ATTR_RDONLY 0x00000001u
#define WF_ATTR_NOSUID 0x00000002u
#define WF_ATTR_NODEV 0x00000004u
#define WF_ATTR_NOEXEC 0x00000008u
#define WF_ATTR_NOSYMFOLLOW 0x00200000u
#define WF_CLOSE_RANGE_CLOEXEC 4u
#define WF_RESOLVE_NO_MAGICLINKS 0x02u
#define WF_RESOLVE_NO_SYMLINKS 0x04u
#define WF_RESOLVE_IN_ROOT 0x10u

struct wf_open_how { uint64_t flags, mode, resolve; };
struct wf_mount_attr { uint64_t attr_set, attr_clr, propagation, userns_fd; };
struct wf_clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

enum { MAX_PACKET = 128 * 1024, MAX_MESSAGE = 16 * 1024 * 1024, MAX_FDS = 32, MAX_PENDING = 64, MAX_HELD = 16 };

static int control = -1;
static int base = -1;            /* the directory in which operations resolve their target paths */
static unsigned last_capability;

/* ------------------------------------------------------------------------------------------------ answers */

struct answer {
    char text[4096];
    size_t length;
};

static void add(struct answer *a, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(a->text + a->length, sizeof a->text - a->length, format, args);
    va_end(args);
    if (n < 0)
        return;
    a->length += (size_t)n < sizeof a->text - a->length ? (size_t)n + 1 : sizeof a->text - a->length;
    a->text[a->length - 1] = '\0';
}

/* Blocks while the daemon is behind: an exit event must not be lost. The daemon never blocks on us. */
static void send_answer(const struct answer *a, int fd)
{
    struct iovec part = {.iov_base = (void *)a->text, .iov_len = a->length};
    union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } ancillary;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        memset(&ancillary, 0, sizeof ancillary);
        message.msg_control = ancillary.space;
        message.msg_controllen = sizeof ancillary.space;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    ssize_t n;
    do
        n = sendmsg(control, &message, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
        _exit(0);
}

static void answer_error(unsigned long sequence, int error, const char *format, ...)
{
    char what[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    struct answer a = {.length = 0};
    add(&a, "err");
    add(&a, "%lu", sequence);
    add(&a, "%d", error);
    add(&a, "%s", what);
    send_answer(&a, -1);
}

static void answer_ok(unsigned long sequence, int fd)
{
    struct answer a = {.length = 0};
    add(&a, "ok");
    add(&a, "%lu", sequence);
    send_answer(&a, fd);
}

/* ------------------------------------------------------------------------------------------------ parsing */

struct message {
    char *at, *end;              /* fields not yet taken; the last byte before `end` is a NUL */
    int fds[MAX_FDS];
    size_t fd_count;
};

static char *take(struct message *m)
{
    if (m->at >= m->end)
        return NULL;
    char *field = m->at;
    m->at += strlen(field) + 1;
    return field;
}

static int parse_number(const char *text, long long low, long long high, long long *value)
{
    if (!text || !*text)
        return -1;
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return errno || *end || *value < low || *value > high ? -1 : 0;
}

static int take_number(struct message *m, long long low, long long high, long long *value)
{
    return parse_number(take(m), low, high, value);
}

static int parse_mode(const char *text, mode_t *mode)
{
    if (!*text)
        return -1;
    char *end;
    unsigned long value = strtoul(text, &end, 8);
    *mode = (mode_t)value;
    return *end || value > 07777 ? -1 : 0;
}

/* "@N": the Nth descriptor of this message; -1 when there is none such. */
static int passed_fd(const struct message *m, const char *text)
{
    long long index;
    if (text[0] != '@' || parse_number(text + 1, 0, MAX_FDS - 1, &index) || (size_t)index >= m->fd_count)
        return -1;
    return m->fds[index];
}

/* Calls with a comma list of words; -1 at the first unknown one. */
struct word { const char *name; unsigned long value; };

static int parse_words(const char *list, const struct word *known, unsigned long *value)
{
    *value = 0;
    while (*list) {
        size_t length = strcspn(list, ",");
        const struct word *w = known;
        while (w->name && (strlen(w->name) != length || memcmp(w->name, list, length)))
            w++;
        if (!w->name)
            return -1;
        *value |= w->value;
        list += length;
        if (*list == ',')
            list++;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ paths */

/* Never leaves `base`, whatever symlinks a snapshot's file layer holds. */
static int open_resolved(const char *path, uint64_t flags, uint64_t resolve)
{
    while (*path == '/')
        path++;
    struct wf_open_how how = {
        .flags = flags | O_CLOEXEC, .resolve = WF_RESOLVE_IN_ROOT | WF_RESOLVE_NO_MAGICLINKS | resolve};
    return (int)syscall(SYS_openat2, base, *path ? path : ".", &how, sizeof how);
}

static int open_in_base(const char *path, uint64_t flags)
{
    return open_resolved(path, flags, 0);
}

static void close_keeping_errno(int fd)
{
    int saved = errno;
    close(fd);
    errno = saved;
}

/* Opens the directory that is to hold `path`'s last component, and points `leaf` at that component. */
static int open_parent(const char *path, const char **leaf)
{
    char parent[4096];
    const char *slash = strrchr(path, '/');
    *leaf = slash ? slash + 1 : path;
    if (!**leaf || !strcmp(*leaf, ".") || !strcmp(*leaf, "..")) {
        errno = EINVAL;
        return -1;
    }
    size_t length = slash ? (size_t)(slash - path) : 0;
    if (length >= sizeof parent) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(parent, path, length);
    parent[length] = '\0';
    return open_in_base(parent, O_PATH | O_DIRECTORY);
}

/* The directory and its missing parents (0755, root); nothing when it is there already. */
static int make_directory(const char *path, mode_t mode, uid_t uid, gid_t gid)
{
    int there = open_in_base(path, O_PATH | O_DIRECTORY);
    if (there >= 0) {
        close(there);
        return 0;
    }
    if (errno != ENOENT)
        return -1;
    const char *leaf;
    int parent = open_parent(path, &leaf);
    if (parent < 0 && errno == ENOENT) {
        char above[4096];
        size_t length = (size_t)(leaf - path);
        while (length && path[length - 1] == '/')
            length--;
        if (!length || length >= sizeof above)
            return -1;
        memcpy(above, path, length);
        above[length] = '\0';
        if (make_directory(above, 0755, 0, 0))
            return -1;
        parent = open_parent(path, &leaf);
    }
    if (parent < 0)
        return -1;
    /* chmod by name: the umask is 0, and nothing else runs in the sandbox while its root is made. */
    int result = mkdirat(parent, leaf, mode);
    if (!result && (uid || gid))
        result = fchownat(parent, leaf, uid, gid, AT_SYMLINK_NOFOLLOW);
    if (!result && (mode & 07000))
        result = fchmodat(parent, leaf, mode, 0);
    close_keeping_errno(parent);
    return result;
}

static int write_file(const char *path, mode_t mode, uid_t uid, gid_t gid, const char *content)
{
    const char *leaf;
    int parent = open_parent(path, &leaf);
    if (parent < 0)
        return -1;
    int fd = openat(parent, leaf, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, mode);
    close_keeping_errno(parent);
    if (fd < 0)
        return -1;
    int result = fchown(fd, uid, gid);
    for (size_t left = strlen(content); !result && left;) {
        ssize_t n = write(fd, content, left);
        if (n < 0)
            result = -1;
        else
            content += n, left -= (size_t)n;
    }
    close_keeping_errno(fd);
    return result;
}

/* ------------------------------------------------------------------------------------------------ mounts */

static const struct word attribute_words[] = {
    {"ro", WF_ATTR_RDONLY}, {"nosuid", WF_ATTR_NOSUID}, {"nodev", WF_ATTR_NODEV}, {"noexec", WF_ATTR_NOEXEC},
    {"rec", 1ul << 32}, {"rw", 1ul << 33}, {"nosymfollow", WF_ATTR_NOSYMFOLLOW}, {"symfollow", 1ul << 34}, {NULL, 0},
};
static const struct word mount_words[] = {
    {"ro", MS_RDONLY}, {"nosuid", MS_NOSUID}, {"nodev", MS_NODEV}, {"noexec", MS_NOEXEC}, {NULL, 0},
};

/* Private, too: a mount the host makes later must not appear inside, writable. */
static int set_attributes(int mount, unsigned long words)
{
    struct wf_mount_attr attributes = {
        .attr_set = words & 0xffffffffu,
        .attr_clr = (words & 1ul << 33 ? WF_ATTR_RDONLY : 0) | (words & 1ul << 34 ? WF_ATTR_NOSYMFOLLOW : 0),
        .propagation = MS_PRIVATE,
    };
    unsigned flags = AT_EMPTY_PATH | (words & 1ul << 32 ? AT_RECURSIVE : 0);
    return (int)syscall(SYS_mount_setattr, mount, "", flags, &attributes, sizeof attributes);
}

static int attach(int mount, const char *target)
{
    int at = open_in_base(target, O_PATH);
    if (at < 0)
        return -1;
    int result = (int)syscall(SYS_move_mount, mount, "", at, "", WF_MOVE_F_EMPTY_PATH | WF_MOVE_T_EMPTY_PATH);
    close_keeping_errno(at);
    return result;
}

/* SRC: a host path, "=PATH" inside the root, or "@N" a detached mount the daemon passes. */
static int bind_mount(const struct message *m, const char *source, const char *target, const char *list)
{
    unsigned long words;
    if (parse_words(list, attribute_words, &words)) {
        errno = EINVAL;
        return -1;
    }
    unsigned recursive = words & 1ul << 32 ? AT_RECURSIVE : 0;
    int mount;
    if (source[0] == '@') {
        int passed = passed_fd(m, source);
        if (passed < 0) {
            errno = EBADF;
            return -1;
        }
        mount = fcntl(passed, F_DUPFD_CLOEXEC, 3);
    } else if (source[0] == '=') {
        int from = open_in_base(source + 1, O_PATH);
        if (from < 0)
            return -1;
        mount = (int)syscall(SYS_open_tree, from, "",
                             WF_OPEN_TREE_CLONE | O_CLOEXEC | AT_EMPTY_PATH | recursive);
        close_keeping_errno(from);
    } else {
        mount = (int)syscall(SYS_open_tree, AT_FDCWD, source, WF_OPEN_TREE_CLONE | O_CLOEXEC | recursive);
    }
    if (mount < 0)
        return -1;
    int result = set_attributes(mount, words);
    if (!result)
        result = attach(mount, target);
    close_keeping_errno(mount);
    return result;
}

static int move_mount_to(const char *source, const char *target)
{
    int mount = (int)syscall(SYS_open_tree, AT_FDCWD, source, O_CLOEXEC);
    if (mount < 0)
        return -1;
    int result = attach(mount, target);
    close_keeping_errno(mount);
    return result;
}

static int mount_new(const char *type, const char *target, const char *list, const char *options)
{
    unsigned long flags;
    if (parse_words(list, mount_words, &flags)) {
        errno = EINVAL;
        return -1;
    }
    int at = open_in_base(target, O_PATH);
    if (at < 0)
        return -1;
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", at);
    int result = mount(type, path, type, flags, *options ? options : NULL);
    close_keeping_errno(at);
    return result;
}

static int set_base(int fd)
{
    if (fd < 0)
        return -1;
    if (base >= 0)
        close(base);
    base = fd;
    return 0;
}

static int pivot(void)
{
    if (fchdir(base) || syscall(SYS_pivot_root, ".", "."))
        return -1;
    /* The old root is now mounted over the new one, and "." is still the new one below. */
    if (umount2(".", MNT_DETACH) || chdir("/"))
        return -1;
    return set_base(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
}

static int unmount(const char *target)
{
    int at = open_in_base(target, O_PATH | O_NOFOLLOW);
    if (at < 0)
        return -1;
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", at);
    int result = umount2(path, MNT_DETACH);
    close_keeping_errno(at);
    return result;
}

/* ------------------------------------------------------------------------------------------------ network */

static int interface_request(unsigned long request, const char *name, struct ifreq *r)
{
    if (strlen(name) >= IFNAMSIZ) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(r->ifr_name, name);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = ioctl(fd, request, r);
    close_keeping_errno(fd);
    return result;
}

static int interface_up(const char *name)
{
    struct ifreq r;
    memset(&r, 0, sizeof r);
    if (interface_request(SIOCGIFFLAGS, name, &r))
        return -1;
    r.ifr_flags |= IFF_UP | IFF_RUNNING;
    return interface_request(SIOCSIFFLAGS, name, &r);
}

static int to_ipv4(const char *text, struct sockaddr *out)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (inet_pton(AF_INET, text, &address.sin_addr) != 1) {
        errno = EINVAL;
        return -1;
    }
    memcpy(out, &address, sizeof address);
    return 0;
}

static int interface_address(const char *name, const char *address, int prefix)
{
    struct ifreq r;
    memset(&r, 0, sizeof r);
    if (to_ipv4(address, &r.ifr_addr) || interface_request(SIOCSIFADDR, name, &r))
        return -1;
    memset(&r, 0, sizeof r);
    struct sockaddr_in mask = {.sin_family = AF_INET};
    mask.sin_addr.s_addr = htonl(prefix ? ~0u << (32 - prefix) : 0);
    memcpy(&r.ifr_netmask, &mask, sizeof mask);
    return interface_request(SIOCSIFNETMASK, name, &r);
}

static int default_route(const char *gateway)
{
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    if (to_ipv4(gateway, &route.rt_gateway) || to_ipv4("0.0.0.0", &route.rt_dst)
        || to_ipv4("0.0.0.0", &route.rt_genmask))
        return -1;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = ioctl(fd, SIOCADDRT, &route);
    close_keeping_errno(fd);
    return result;
}

static int delete_link(const char *name)
{
    unsigned index = if_nametoindex(name);
    if (!index)
        return -1;
    struct { struct nlmsghdr header; struct ifinfomsg body; } request = {
        .header = {.nlmsg_len = sizeof request, .nlmsg_type = RTM_DELLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
        .body = {.ifi_index = (int)index},
    };
    struct { struct nlmsghdr header; struct nlmsgerr body; char rest[512]; } reply;
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0)
        return -1;
    ssize_t n = send(fd, &request, sizeof request, 0);
    if (n >= 0)
        n = recv(fd, &reply, sizeof reply, 0);
    close_keeping_errno(fd);
    if (n < 0)
        return -1;
    if (n < (ssize_t)offsetof(__typeof__(reply), rest) || reply.header.nlmsg_type != NLMSG_ERROR) {
        errno = EPROTO;
        return -1;
    }
    errno = -reply.body.error;
    return reply.body.error ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------ operations */

static const struct operation { const char *name; int arguments; } operations[] = {
    {"mkdir", 4},    /* PATH MODE UID GID: with missing parents; nothing when it is there */
    {"symlink", 2},  /* TEXT PATH */
    {"mknod", 7},    /* PATH c|p MODE MAJOR MINOR UID GID */
    {"chown", 3},    /* PATH UID GID */
    {"chmod", 2},    /* PATH MODE */
    {"write", 5},    /* PATH MODE UID GID TEXT */
    {"touch", 1},    /* PATH: an empty file to mount on, when there is none */
    {"straight", 1}, /* PATH: an error when it leads through a symlink; it need not exist */
    {"bind", 3},     /* SOURCE TARGET ATTRIBUTES */
    {"move", 2},     /* SOURCE TARGET */
    {"mount", 4},    /* TYPE TARGET FLAGS OPTIONS */
    {"setattr", 2},  /* TARGET ATTRIBUTES */
    {"umount", 1},   /* TARGET */
    {"enter", 1},    /* PATH: targets resolve below it from now on */
    {"pivot", 0},    /* make that the root, and let go of the old one */
    {"hold", 1},     /* PATH: keep it open; the answer names the descriptor */
    {"hostname", 1}, /* NAME */
    {"ifup", 1},     /* NAME */
    {"addr", 3},     /* NAME IPV4 PREFIX */
    {"route", 1},    /* GATEWAY */
    {"linkdel", 1},  /* NAME */
    {NULL, 0},
};

static const struct operation *find_operation(const char *name)
{
    for (const struct operation *o = operations; o->name; o++)
        if (!strcmp(o->name, name))
            return o;
    return NULL;
}

static int bad_argument(void)
{
    errno = EINVAL;
    return -1;
}

static int owner(char *uid_text, char *gid_text, uid_t *uid, gid_t *gid)
{
    long long u, g;
    if (parse_number(uid_text, 0, 0xfffffffeLL, &u) || parse_number(gid_text, 0, 0xfffffffeLL, &g))
        return bad_argument();
    *uid = (uid_t)u;
    *gid = (gid_t)g;
    return 0;
}

static int held_count;

static int perform(const struct message *m, const char *name, char **a, struct answer *results)
{
    mode_t mode;
    uid_t uid;
    gid_t gid;
    long long number, other;
    const char *leaf;
    int fd, result;

    if (!strcmp(name, "mkdir")) {
        if (parse_mode(a[1], &mode) || owner(a[2], a[3], &uid, &gid))
            return bad_argument();
        return make_directory(a[0], mode, uid, gid);
    }
    if (!strcmp(name, "symlink")) {
        if ((fd = open_parent(a[1], &leaf)) < 0)
            return -1;
        result = symlinkat(a[0], fd, leaf);
        close_keeping_errno(fd);
        return result;
    }
    if (!strcmp(name, "mknod")) {
        if (parse_mode(a[2], &mode) || parse_number(a[3], 0, 4095, &number) || parse_number(a[4], 0, 1048575, &other)
            || owner(a[5], a[6], &uid, &gid) || (strcmp(a[1], "c") && strcmp(a[1], "p")))
            return bad_argument();
        if ((fd = open_parent(a[0], &leaf)) < 0)
            return -1;
        dev_t device = a[1][0] == 'c' ? makedev((unsigned)number, (unsigned)other) : 0;
        result = mknodat(fd, leaf, mode | (a[1][0] == 'c' ? S_IFCHR : S_IFIFO), device);
        if (!result)
            result = fchownat(fd, leaf, uid, gid, AT_SYMLINK_NOFOLLOW);
        close_keeping_errno(fd);
        return result;
    }
    if (!strcmp(name, "chown")) {
        if (owner(a[1], a[2], &uid, &gid))
            return -1;
        if ((fd = open_in_base(a[0], O_PATH)) < 0)
            return -1;
        result = fchownat(fd, "", uid, gid, AT_EMPTY_PATH);
        close_keeping_errno(fd);
        return result;
    }
    if (!strcmp(name, "chmod")) {
        if (parse_mode(a[1], &mode))
            return bad_argument();
        if ((fd = open_in_base(a[0], O_RDONLY | O_NONBLOCK)) < 0)
            return -1;
        result = fchmod(fd, mode);
        close_keeping_errno(fd);
        return result;
    }
    if (!strcmp(name, "write")) {
        if (parse_mode(a[1], &mode) || owner(a[2], a[3], &uid, &gid))
            return bad_argument();
        return write_file(a[0], mode, uid, gid, a[4]);
    }
    if (!strcmp(name, "touch")) {
        if ((fd = open_in_base(a[0], O_PATH)) >= 0) {
            close(fd);
            return 0;
        }
        return errno == ENOENT ? write_file(a[0], 0644, 0, 0, "") : -1;
    }
    if (!strcmp(name, "straight")) {
        if ((fd = open_resolved(a[0], O_PATH, WF_RESOLVE_NO_SYMLINKS)) >= 0)
            close(fd);
        return fd < 0 && errno != ENOENT ? -1 : 0;
    }
    if (!strcmp(name, "bind"))
        return bind_mount(m, a[0], a[1], a[2]);
    if (!strcmp(name, "move"))
        return move_mount_to(a[0], a[1]);
    if (!strcmp(name, "mount"))
        return mount_new(a[0], a[1], a[2], a[3]);
    if (!strcmp(name, "setattr")) {
        unsigned long words;
        if (parse_words(a[1], attribute_words, &words))
            return bad_argument();
        if ((fd = open_resolved(a[0], O_PATH | O_NOFOLLOW, WF_RESOLVE_NO_SYMLINKS)) < 0)
            return -1;
        result = set_attributes(fd, words);
        close_keeping_errno(fd);
        return result;
    }
    if (!strcmp(name, "umount"))
        return unmount(a[0]);
    if (!strcmp(name, "enter"))
        return set_base(open_in_base(a[0], O_PATH | O_DIRECTORY));
    if (!strcmp(name, "pivot"))
        return pivot();
    if (!strcmp(name, "hold")) {
        if (held_count == MAX_HELD) {
            errno = EMFILE;
            return -1;
        }
        if ((fd = open_in_base(a[0], O_RDONLY | O_DIRECTORY)) < 0)
            return -1;
        held_count++;
        add(results, "%d", fd);
        return 0;
    }
    if (!strcmp(name, "hostname"))
        return sethostname(a[0], strlen(a[0]));
    if (!strcmp(name, "ifup"))
        return interface_up(a[0]);
    if (!strcmp(name, "addr"))
        return parse_number(a[2], 0, 32, &number) ? bad_argument() : interface_address(a[0], a[1], (int)number);
    if (!strcmp(name, "route"))
        return default_route(a[0]);
    if (!strcmp(name, "linkdel"))
        return delete_link(a[0]);
    return bad_argument();
}

static void run_operations(unsigned long sequence, struct message *m)
{
    struct message scan = *m;
    int index = 0;
    for (char *name; (name = take(&scan)); index++) {
        const struct operation *o = find_operation(name);
        if (!o) {
            answer_error(sequence, EINVAL, "op %d: unknown operation", index);
            return;
        }
        for (int i = 0; i < o->arguments; i++)
            if (!take(&scan)) {
                answer_error(sequence, EINVAL, "op %d: %s: too few arguments", index, name);
                return;
            }
    }
    struct answer results = {.length = 0};
    add(&results, "ok");
    add(&results, "%lu", sequence);
    index = 0;
    for (char *name; (name = take(m)); index++) {
        char *arguments[8] = {NULL};
        const struct operation *o = find_operation(name);
        for (int i = 0; i < o->arguments; i++)
            arguments[i] = take(m);
        if (perform(m, name, arguments, &results)) {
            int error = errno;
            answer_error(sequence, error, "op %d: %s %.400s %.400s", index, name,
                         o->arguments > 0 ? arguments[0] : "", o->arguments > 1 ? arguments[1] : "");
            return;
        }
    }
    send_answer(&results, -1);
}

/* ------------------------------------------------------------------------------------------------ seccomp */

#if defined(__x86_64__)
#define WF_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define WF_ARCH AUDIT_ARCH_AARCH64
#else
#error "woodfrog-init has a seccomp filter for x86-64 and arm64 only"
#endif

#define WF_NEW_NAMESPACES 0x7e020080u  /* every CLONE_NEW*; 0x80 (NEWTIME) is part of clone's exit signal */
/* A child of init's would be none of the worker's: CRIU does not stop it, and it could change under CRIU's hands what is
 * being dumped. */
#define WF_REFUSED_CLONES ((WF_NEW_NAMESPACES & ~0x80u) | CLONE_PARENT)

/* What CRIU cannot dump says "not implemented", so that programs fall back; what would be an escape says "no". */
static const int absent_calls[] = {
    425, 426, 427,               /* io_uring_setup, io_uring_enter, io_uring_register */
    435,                         /* clone3: its flags are behind a pointer; libc falls back to clone */
    447,                         /* memfd_secret */
    SYS_pkey_alloc,              /* keys of memory are not in a dump: a browser crashes at the next use of one */
};
static const int refused_calls[] = {
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, 428, 429, 430, 431, 432, 433, 442, /* new mount interface */
    467,                         /* open_tree_attr */
    SYS_setns, SYS_swapon, SYS_swapoff, SYS_reboot, SYS_settimeofday, SYS_clock_settime, SYS_clock_adjtime,
    SYS_adjtimex, SYS_acct, SYS_quotactl, 443 /* quotactl_fd */, SYS_syslog, SYS_sethostname, SYS_setdomainname,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_kexec_file_load,
    SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev,
    SYS_kcmp, 438 /* pidfd_getfd */, 440 /* process_madvise */, SYS_add_key, SYS_request_key, SYS_keyctl,
    SYS_open_by_handle_at, SYS_fanotify_init, SYS_vhangup,
#ifdef SYS_lookup_dcookie
    SYS_lookup_dcookie,
#endif
#ifdef SYS_nfsservctl
    SYS_nfsservctl,
#endif
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_uselib, SYS_ustat, SYS__sysctl, SYS_modify_ldt,
#endif
};

enum { MAX_FILTER = 160 };

static size_t build_filter(struct sock_filter *f)
{
    size_t n = 0;
    const size_t absent = sizeof absent_calls / sizeof *absent_calls;
    const size_t refused = sizeof refused_calls / sizeof *refused_calls;
    const struct sock_filter no_such_call = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    const struct sock_filter no_permission = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    const struct sock_filter no_family = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    const struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
#define LOAD(field) (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(test, value, yes, no) (struct sock_filter)BPF_JUMP(BPF_JMP | (test) | BPF_K, (uint32_t)(value), yes, no)
    f[n++] = LOAD(arch);
    f[n++] = IF(BPF_JEQ, WF_ARCH, 1, 0);
    f[n++] = no_such_call;       /* 32-bit calls */
    f[n++] = LOAD(nr);
#ifdef __x86_64__
    f[n++] = IF(BPF_JGE, 0x40000000u, 0, 1);
    f[n++] = no_such_call;       /* x32 */
#endif
    for (size_t i = 0; i < absent; i++) {
        f[n++] = IF(BPF_JEQ, absent_calls[i], 0, 1);
        f[n++] = no_such_call;
    }
    /* Conditional jumps reach 255 instructions: all these can share one refusal. */
    for (size_t i = 0; i < refused; i++)
        f[n++] = IF(BPF_JEQ, refused_calls[i], refused - i, 0);
    f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JA, 1, 0, 0);
    f[n++] = no_permission;
    f[n++] = IF(BPF_JEQ, SYS_clone, 0, 4);
    f[n++] = LOAD(args[0]);
    f[n++] = IF(BPF_JSET, WF_REFUSED_CLONES, 0, 1);
    f[n++] = no_permission;
    f[n++] = allow;
    f[n++] = IF(BPF_JEQ, SYS_unshare, 0, 4);
    f[n++] = LOAD(args[0]);
    f[n++] = IF(BPF_JSET, WF_NEW_NAMESPACES, 0, 1);
    f[n++] = no_permission;
    f[n++] = allow;
    /* The worker stays the one to whom its orphans go; see WF_REFUSED_CLONES. */
    f[n++] = IF(BPF_JEQ, SYS_prctl, 0, 6);
    f[n++] = LOAD(args[0]);
    f[n++] = IF(BPF_JEQ, PR_SET_CHILD_SUBREAPER, 0, 3);
    f[n++] = LOAD(args[1]);
    f[n++] = IF(BPF_JEQ, 0, 0, 1);
    f[n++] = no_permission;
    f[n++] = allow;
    /* Families that are not bound to a network namespace, or reach into the kernel. */
    f[n++] = IF(BPF_JEQ, SYS_socket, 0, 4);
    f[n++] = LOAD(args[0]);
    f[n++] = IF(BPF_JEQ, AF_VSOCK, 1, 0);
    f[n++] = IF(BPF_JEQ, AF_ALG, 0, 1);
    f[n++] = no_family;
    f[n++] = allow;
#undef LOAD
#undef IF
    return n;
}

/* ------------------------------------------------------------------------------------------------ spawn */

enum caps_mode { CAPS_NONE, CAPS_HELD, CAPS_AMBIENT };
enum { SPAWN_NO_NEW_PRIVS = 1, SPAWN_SECCOMP = 2, SPAWN_NEW_SESSION = 4, SPAWN_SUBREAPER = 8 };
static const struct word spawn_words[] = {
    {"no_new_privs", SPAWN_NO_NEW_PRIVS}, {"seccomp", SPAWN_SECCOMP}, {"new_session", SPAWN_NEW_SESSION},
    {"subreaper", SPAWN_SUBREAPER}, {NULL, 0},
};

struct limit { int resource; struct rlimit value; };
struct target { int target, source; };

struct spawn {
    uid_t uid;
    gid_t gid;
    enum caps_mode caps;
    unsigned long flags;
    mode_t mask;
    pid_t pid;
    char *cwd, *stdio[3];
    struct limit limits[RLIM_NLIMITS];
    struct target targets[MAX_FDS];
    size_t limit_count, target_count;
    char **argv, **envp;
};

struct failure { int error; char step[32]; };

static struct pending { pid_t pid; int pipe; unsigned long sequence; int pidfd; } pendings[MAX_PENDING];
static size_t pending_count;

static int apply_capabilities(const struct spawn *s, const char **step)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    *step = "capabilities";
    if (syscall(SYS_capget, &header, data))
        return -1;
    if (s->caps == CAPS_NONE)
        for (unsigned c = 0; c <= last_capability; c++)
            if (prctl(PR_CAPBSET_DROP, c, 0, 0, 0))
                return -1;
    if (s->caps == CAPS_AMBIENT && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        return -1;
    *step = "user";
    if (setgroups(0, NULL) || setresgid(s->gid, s->gid, s->gid) || setresuid(s->uid, s->uid, s->uid))
        return -1;
    *step = "capabilities";
    if (s->caps == CAPS_NONE) {
        memset(data, 0, sizeof data);
        return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) || syscall(SYS_capset, &header, data) ? -1 : 0;
    }
    if (s->caps == CAPS_AMBIENT) {
        for (int i = 0; i < 2; i++)
            data[i].effective = data[i].inheritable = data[i].permitted;
        if (syscall(SYS_capset, &header, data))
            return -1;
        for (unsigned c = 0; c <= last_capability; c++)
            if (data[c / 32].permitted & (1u << (c % 32))
                && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, c, 0, 0))
                return -1;
    }
    return 0;
}

static int install_filter(void)
{
    struct sock_filter filter[MAX_FILTER];
    struct sock_fprog program = {.len = (unsigned short)build_filter(filter), .filter = filter};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

/* In the child; returns only on failure, with errno set. */
static const char *become(const struct spawn *s)
{
    const char *step;
    if (s->flags & SPAWN_NEW_SESSION && setsid() < 0)
        return "setsid";
    /* All sources lie above every target: received descriptors and these are moved to 512 and up. */
    int stdio[3];
    for (int i = 0; i < 3; i++) {
        const char *path = *s->stdio[i] ? s->stdio[i] : "/dev/null";
        int fd = path[0] == '@' ? atoi(path + 1)
                                : open(path, (i ? O_RDWR : O_RDONLY) | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0)
            return i == 0 ? "stdin" : i == 1 ? "stdout" : "stderr";
        if ((stdio[i] = fcntl(fd, F_DUPFD_CLOEXEC, 512)) < 0)
            return "descriptors";
    }
    int passed[MAX_FDS];
    for (size_t i = 0; i < s->target_count; i++)
        if ((passed[i] = fcntl(s->targets[i].source, F_DUPFD_CLOEXEC, 512)) < 0)
            return "descriptors";
    if (syscall(SYS_close_range, 3, ~0u, WF_CLOSE_RANGE_CLOEXEC))
        return "descriptors";
    for (int i = 0; i < 3; i++)
        if (dup2(stdio[i], i) < 0)
            return "descriptors";
    for (size_t i = 0; i < s->target_count; i++)
        if (dup2(passed[i], s->targets[i].target) < 0)
            return "descriptors";
    for (size_t i = 0; i < s->limit_count; i++)
        if (setrlimit((__rlimit_resource_t)s->limits[i].resource, &s->limits[i].value))
            return "rlimit";
    umask(s->mask);
    if (s->flags & SPAWN_SUBREAPER && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        return "subreaper";
    if (s->flags & SPAWN_NO_NEW_PRIVS && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return "no_new_privs";
    if (apply_capabilities(s, &step))
        return step;
    if (chdir(s->cwd))
        return "chdir";
    if (s->flags & SPAWN_SECCOMP && install_filter())
        return "seccomp";
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    environ = s->envp;
    execvp(s->argv[0], s->argv);
    return "exec";
}

static int take_strings(struct message *m, char ***list)
{
    long long count;
    if (take_number(m, 0, 65536, &count))
        return -1;
    char **strings = calloc((size_t)count + 1, sizeof *strings);
    if (!strings)
        return -1;
    for (long long i = 0; i < count; i++)
        if (!(strings[i] = take(m))) {
            free(strings);
            return -1;
        }
    *list = strings;
    return 0;
}

static int parse_rlimit(const char *text, rlim_t *value)
{
    long long number;
    if (text && !strcmp(text, "inf")) {
        *value = RLIM_INFINITY;
        return 0;
    }
    if (parse_number(text, 0, INT64_MAX, &number))
        return -1;
    *value = (rlim_t)number;
    return 0;
}

static const char *parse_spawn(struct message *m, struct spawn *s)
{
    long long n, count;
    if (take_number(m, 0, 0xfffffffeLL, &n))
        return "uid";
    s->uid = (uid_t)n;
    if (take_number(m, 0, 0xfffffffeLL, &n))
        return "gid";
    s->gid = (gid_t)n;
    const char *text = take(m);
    if (!text || (strcmp(text, "none") && strcmp(text, "held") && strcmp(text, "ambient")))
        return "caps";
    s->caps = text[0] == 'n' ? CAPS_NONE : text[0] == 'h' ? CAPS_HELD : CAPS_AMBIENT;
    if (!(text = take(m)) || parse_words(text, spawn_words, &s->flags))
        return "flags";
    if (s->flags & SPAWN_SECCOMP && !(s->flags & SPAWN_NO_NEW_PRIVS))
        return "flags: seccomp needs no_new_privs";
    if (!(text = take(m)) || parse_mode(text, &s->mask))
        return "umask";
    if (take_number(m, 0, 4194304, &n) || n == 1)
        return "pid";
    s->pid = (pid_t)n;
    if (!(s->cwd = take(m)) || s->cwd[0] != '/')
        return "cwd";
    for (int i = 0; i < 3; i++) {
        if (!(s->stdio[i] = take(m)))
            return "stdio";
        if (s->stdio[i][0] == '@') {
            int fd = passed_fd(m, s->stdio[i]);
            if (fd < 0)
                return "stdio: no such descriptor";
            /* become() reads the descriptor's own number; it has at least as many digits as fit before the NUL. */
            static char names[3][16];
            snprintf(names[i], sizeof names[i], "@%d", fd);
            s->stdio[i] = names[i];
        } else if (s->stdio[i][0] && s->stdio[i][0] != '/') {
            return "stdio";
        }
    }
    if (take_number(m, 0, RLIM_NLIMITS, &count))
        return "rlimits";
    for (s->limit_count = 0; s->limit_count < (size_t)count; s->limit_count++) {
        struct limit *l = &s->limits[s->limit_count];
        if (take_number(m, 0, RLIM_NLIMITS - 1, &n) || parse_rlimit(take(m), &l->value.rlim_cur)
            || parse_rlimit(take(m), &l->value.rlim_max))
            return "rlimits";
        l->resource = (int)n;
    }
    if (take_number(m, 0, MAX_FDS, &count))
        return "descriptors";
    for (s->target_count = 0; s->target_count < (size_t)count; s->target_count++) {
        struct target *t = &s->targets[s->target_count];
        if (take_number(m, 3, 255, &n) || !(text = take(m)) || (t->source = passed_fd(m, text)) < 0)
            return "descriptors";
        t->target = (int)n;
    }
    if (take_strings(m, &s->argv))
        return "argv";
    if (!s->argv[0] || !*s->argv[0])
        return "argv";
    if (take_strings(m, &s->envp))
        return "env";
    return take(m) ? "trailing fields" : NULL;
}

/* A chosen pid does not move the kernel's cursor. Where it stands, a worker's threads would get the pids that CRIU
 * needs for itself when it restores them. From 300 on the kernel never goes back below 300. */
enum { FIRST_PLAIN_PID = 300 };

static int set_last_pid(pid_t pid)
{
    int fd = open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    char text[16];
    int length = snprintf(text, sizeof text, "%d", pid);
    int result = write(fd, text, (size_t)length) == length ? 0 : -1;
    close_keeping_errno(fd);
    return result;
}

static void spawn(unsigned long sequence, struct message *m)
{
    struct spawn s = {0};
    const char *wrong = parse_spawn(m, &s);
    if (wrong) {
        answer_error(sequence, EINVAL, "spawn: %s", wrong);
        goto done;
    }
    if (pending_count == MAX_PENDING) {
        answer_error(sequence, EAGAIN, "spawn: too many at once");
        goto done;
    }
    /* Without CONFIG_CHECKPOINT_RESTORE there is no such file, or none that was made writable: nothing is frozen then. */
    if (s.pid && set_last_pid(s.pid < FIRST_PLAIN_PID ? FIRST_PLAIN_PID : s.pid) && errno != ENOENT && errno != EROFS) {
        answer_error(sequence, errno, "spawn: ns_last_pid");
        goto done;
    }
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) {
        answer_error(sequence, errno, "spawn: pipe");
        goto done;
    }
    int pidfd = -1;
    pid_t wanted = s.pid;
    struct wf_clone_args args = {
        .flags = CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&pidfd, .exit_signal = SIGCHLD,
        .set_tid = wanted ? (uint64_t)(uintptr_t)&wanted : 0, .set_tid_size = wanted ? 1 : 0,
    };
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        struct failure failure = {0};
        int end = fcntl(ends[1], F_DUPFD_CLOEXEC, 300);
        snprintf(failure.step, sizeof failure.step, "%s", become(&s));
        failure.error = errno;
        if (write(end, &failure, sizeof failure) < 0)
            _exit(126);
        _exit(127);
    }
    int error = errno;
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        answer_error(sequence, error, "spawn: clone");
        goto done;
    }
    /* Answered when the pipe closes (the exec worked) or tells a failure: an exec can block, PID 1 must not. */
    pendings[pending_count++] = (struct pending){(pid_t)pid, ends[0], sequence, pidfd};
done:
    free(s.argv);
    free(s.envp);
}

static void finish_spawn(size_t index)
{
    struct pending p = pendings[index];
    struct failure failure;
    ssize_t n = read(p.pipe, &failure, sizeof failure);
    if (n < 0 && errno == EINTR)
        return;
    pendings[index] = pendings[--pending_count];
    if (n == (ssize_t)sizeof failure) {
        /* It is about to exit; its end is no news to anyone. */
        while (waitpid(p.pid, NULL, 0) < 0 && errno == EINTR)
            ;
        failure.step[sizeof failure.step - 1] = '\0';
        answer_error(p.sequence, failure.error, "spawn: %s", failure.step);
    } else {
        struct answer a = {.length = 0};
        add(&a, "ok");
        add(&a, "%lu", p.sequence);
        add(&a, "%d", p.pid);
        send_answer(&a, p.pidfd);
    }
    close(p.pidfd);
    close(p.pipe);
}

/* ------------------------------------------------------------------------------------------------ the loop */

static void handle(struct message *m)
{
    long long sequence, pid, number;
    if (take_number(m, 1, INT64_MAX / 2, &sequence)) {
        answer_error(0, EINVAL, "no sequence number");
        return;
    }
    const char *command = take(m);
    if (!command) {
        answer_error((unsigned long)sequence, EINVAL, "no command");
    } else if (!strcmp(command, "ops")) {
        run_operations((unsigned long)sequence, m);
    } else if (!strcmp(command, "spawn")) {
        spawn((unsigned long)sequence, m);
    } else if (!strcmp(command, "signal")) {
        if (take_number(m, -4194304, 4194304, &pid) || take_number(m, 0, 64, &number) || take(m) || !pid || pid == 1)
            answer_error((unsigned long)sequence, EINVAL, "signal");
        else if (kill((pid_t)pid, (int)number))
            answer_error((unsigned long)sequence, errno, "signal %lld", pid);
        else
            answer_ok((unsigned long)sequence, -1);
    } else if (!strcmp(command, "pidfd")) {
        int fd;
        if (take_number(m, 1, 4194304, &pid) || take(m)) {
            answer_error((unsigned long)sequence, EINVAL, "pidfd");
        } else if ((fd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0)) < 0) {
            answer_error((unsigned long)sequence, errno, "pidfd %lld", pid);
        } else {
            answer_ok((unsigned long)sequence, fd);
            close(fd);
        }
    } else if (!strcmp(command, "lastpid")) {
        if (take_number(m, 1, 4194304, &pid) || take(m))
            answer_error((unsigned long)sequence, EINVAL, "lastpid");
        else if (set_last_pid((pid_t)pid))
            answer_error((unsigned long)sequence, errno, "lastpid %lld", pid);
        else
            answer_ok((unsigned long)sequence, -1);
    } else if (!strcmp(command, "ping")) {
        answer_ok((unsigned long)sequence, -1);
    } else {
        answer_error((unsigned long)sequence, EINVAL, "unknown command");
    }
}

/* Returns the memfd's text, to be freed, or NULL with errno. */
static char *read_memfd(int fd, size_t *length)
{
    struct stat about;
    if (fstat(fd, &about))
        return NULL;
    if (!S_ISREG(about.st_mode) || about.st_size < 1 || about.st_size > MAX_MESSAGE) {
        errno = EMSGSIZE;
        return NULL;
    }
    char *text = malloc((size_t)about.st_size);
    if (!text)
        return NULL;
    size_t got = 0;
    while (got < (size_t)about.st_size) {
        ssize_t n = pread(fd, text + got, (size_t)about.st_size - got, (off_t)got);
        if (n <= 0) {
            free(text);
            errno = n ? errno : EIO;
            return NULL;
        }
        got += (size_t)n;
    }
    *length = got;
    return text;
}

static void receive(void)
{
    static char packet[MAX_PACKET];
    union { char space[CMSG_SPACE(sizeof(int) * MAX_FDS)]; struct cmsghdr align; } ancillary;
    struct iovec part = {.iov_base = packet, .iov_len = sizeof packet};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.space, .msg_controllen = sizeof ancillary.space,
    };
    ssize_t n = recvmsg(control, &header, MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    struct message m = {.fd_count = 0};
    if (n >= 0)
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c))
            if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
                size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                for (size_t i = 0; i < count; i++) {
                    int fd;
                    memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                    if (m.fd_count < MAX_FDS)
                        m.fds[m.fd_count++] = fd;
                    else
                        close(fd);
                }
            }
    if (n <= 0)
        _exit(0);                /* the daemon is gone: so are we, and with us the namespace */
    char *text = packet, *long_text = NULL;
    size_t length = (size_t)n;
    if (length == sizeof "memfd" && !memcmp(packet, "memfd", sizeof "memfd") && m.fd_count) {
        text = long_text = read_memfd(m.fds[0], &length);
        close(m.fds[0]);
        memmove(m.fds, m.fds + 1, --m.fd_count * sizeof *m.fds);
    }
    if (!text)
        answer_error(0, errno, "memfd");
    else if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || text[length - 1])
        answer_error(0, EMSGSIZE, "message cut short");
    else {
        m.at = text;
        m.end = text + length;
        handle(&m);
    }
    free(long_text);
    for (size_t i = 0; i < m.fd_count; i++)
        close(m.fds[i]);
}

static void reap(void)
{
    for (;;) {
        siginfo_t info = {.si_pid = 0};
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) || !info.si_pid)
            return;
        /* A child that may still have to tell why its exec failed is finish_spawn's first. */
        for (size_t i = 0; i < pending_count; i++)
            if (pendings[i].pid == info.si_pid) {
                finish_spawn(i);
                break;
            }
        int status;
        if (waitpid(info.si_pid, &status, WNOHANG) != info.si_pid)
            continue;
        struct answer a = {.length = 0};
        add(&a, "exit");
        add(&a, "%d", info.si_pid);
        add(&a, "%d", status);
        send_answer(&a, -1);
    }
}

static void init_loop(void)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    base = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (signals < 0 || base < 0) {
        answer_error(0, errno, "signalfd");
        _exit(1);
    }
    struct answer ready = {.length = 0};
    add(&ready, "ready");
    send_answer(&ready, -1);
    for (;;) {
        struct pollfd polled[2 + MAX_PENDING] = {{control, POLLIN, 0}, {signals, POLLIN, 0}};
        for (size_t i = 0; i < pending_count; i++)
            polled[2 + i] = (struct pollfd){pendings[i].pipe, POLLIN, 0};
        size_t watched = pending_count;
        if (poll(polled, 2 + watched, -1) < 0) {
            if (errno == EINTR)
                continue;
            _exit(1);
        }
        /* From the end: finish_spawn fills a gap with the last. */
        for (size_t i = watched; i-- > 0;)
            if (polled[2 + i].revents)
                finish_spawn(i);
        if (polled[1].revents) {
            struct signalfd_siginfo information[8];
            while (read(signals, information, sizeof information) > 0)
                ;
            reap();
        }
        if (polled[0].revents)
            receive();
    }
}

/* ------------------------------------------------------------------------------------------------ launch */

static void fail(const char *what)
{
    answer_error(0, errno, "%s", what);
    _exit(1);
}

static void read_last_capability(void)
{
    while (last_capability < 63 && prctl(PR_CAPBSET_READ, last_capability + 1, 0, 0, 0) >= 0)
        last_capability++;
}

static void set_time_offsets(const char *monotonic, const char *boottime)
{
    long long m, b;
    if (parse_number(monotonic, INT64_MIN, INT64_MAX, &m) || parse_number(boottime, INT64_MIN, INT64_MAX, &b)) {
        errno = EINVAL;
        fail("time namespace offsets");
    }
    if (unshare(CLONE_NEWTIME))
        fail("time namespace");
    const long long billion = 1000000000;
    char text[128];
    int length = snprintf(text, sizeof text, "monotonic %lld %lld\nboottime %lld %lld\n",
                          (m - ((m % billion) + billion) % billion) / billion, ((m % billion) + billion) % billion,
                          (b - ((b % billion) + billion) % billion) / billion, ((b % billion) + billion) % billion);
    int fd = open("/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, (size_t)length) != length)
        fail("time namespace offsets");
    close(fd);
}

int main(int argc, char **argv)
{
    int cgroups[16], cgroup_count = 0;
    long long number;
    const char *monotonic = NULL, *boottime = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--control") && i + 1 < argc && !parse_number(argv[i + 1], 3, 1 << 20, &number)) {
            control = (int)number;
            i++;
        } else if (!strcmp(argv[i], "--cgroup") && i + 1 < argc && cgroup_count < 16
                   && !parse_number(argv[i + 1], 3, 1 << 20, &number)) {
            cgroups[cgroup_count++] = (int)number;
            i++;
        } else if (!strcmp(argv[i], "--timens") && i + 2 < argc) {
            monotonic = argv[i + 1];
            boottime = argv[i + 2];
            i += 2;
        } else {
            fprintf(stderr, "woodfrog-init: unknown argument %s\n", argv[i]);
            return 2;
        }
    }
    if (control < 0) {
        fprintf(stderr, "usage: woodfrog-init --control FD [--cgroup FD]... [--timens MONOTONIC_NS BOOTTIME_NS]\n");
        return 2;
    }
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    umask(0);
    read_last_capability();
    if (monotonic)
        set_time_offsets(monotonic, boottime);
    int pidfd = -1;
    struct wf_clone_args args = {
        .flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_PARENT | CLONE_PIDFD,
        .pidfd = (uint64_t)(uintptr_t)&pidfd,
    };
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        fail("new namespaces");
    if (pid > 0) {
        struct answer launched = {.length = 0};
        add(&launched, "launched");
        add(&launched, "%ld", pid);
        send_answer(&launched, pidfd);
        return 0;
    }
    /* A daemon that died before this line has closed the socket: the loop sees that. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
        fail("parent death signal");
    /* /proc/1/cmdline is readable inside: no host paths there. */
    char *arguments_end = argv[argc - 1] + strlen(argv[argc - 1]);
    memset(argv[0], 0, (size_t)(arguments_end - argv[0]));
    memcpy(argv[0], "woodfrog-init", sizeof "woodfrog-init");
    prctl(PR_SET_NAME, "woodfrog-init", 0, 0, 0);
    for (int i = 0; i < cgroup_count; i++)
        if (write(cgroups[i], "0", 1) != 1)
            fail("join cgroup");
    if (setsid() < 0 || chdir("/"))
        fail("session");
    /* Host mounts made while this sandbox waits in the pool still arrive; nothing of ours goes back. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL))
        fail("mount propagation");
    if (control != 3) {
        if (dup2(control, 3) < 0)
            fail("control socket");
        control = 3;
    }
    syscall(SYS_close_range, 4, ~0u, 0);
    fcntl(control, F_SETFD, FD_CLOEXEC);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 3; i++)
        if (null < 0 || dup2(null, i) < 0)
            fail("stdio");
    init_loop();
}
