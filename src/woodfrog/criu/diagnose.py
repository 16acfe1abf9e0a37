"""From a log of CRIU's to the one cause and its remedy. `docs/failure-modes.md` holds `TABLE` as text.

CRIU logs an error once where it happens and again at every level above; it also logs errors that harm nothing. The
cause is the first line that is known, and failing that the first that is not known to be an echo or harmless.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["TABLE", "Diagnosis", "Known", "diagnose", "error_lines", "markdown", "tail"]

When = Literal["capture", "restore", "both"]


@dataclass(frozen=True)
class Known:
    """One cause that CRIU names in its log.

    Args:
        code: stable name.
        seen: a line as users meet it.
        pattern: what to look for; its named groups fill `{...}` in `cause`.
        at_fault: in a restore: the snapshot is bad and will never restore.
        broad: too general to be believed while a later line says more.
    """

    code: str
    when: When
    seen: str
    pattern: str
    cause: str
    remedy: str
    at_fault: bool = False
    broad: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What a log means. `line` is the log's own text, empty when it holds no error."""

    code: str
    cause: str
    remedy: str
    line: str
    at_fault: bool = False

    def __str__(self) -> str:
        return f"{self.cause}: {self.remedy}" if self.remedy else self.cause


RETRY_WARM = "open it after the snapshot instead (in enter(snap=False)), or close it in a register_before_snapshot hook"
REPORT = "the full log is shown by `woodfrog snapshot inspect --log`; please report it"

TABLE: tuple[Known, ...] = (
    # ------------------------------------------------------------------------------------- capture: descriptors
    Known(
        "io-uring", "capture",
        "pie: 100: Error (criu/pie/parasite.c:588): send_fds failed (-22)",
        r"send_fds failed \(-22\)|anon_inode:\[io_uring\]",
        "a process holds an io_uring, which CRIU cannot capture",
        f"turn io_uring off in that library, or {RETRY_WARM}",
    ),
    Known(
        "gpu-device", "capture",
        "Error (criu/files-ext.c:94): Can't dump file 17 of that type [20666] (chr 195:255)",
        r"Can't dump file (?P<fd>\d+) of that type \[\d+\] \(chr 195:",
        "a process holds a GPU device (descriptor {fd}), which CRIU cannot capture",
        "do not touch the GPU before the snapshot: move the model to it in enter(snap=False); check children "
        "left by fork too",
    ),
    Known(
        "device", "capture",
        "Error (criu/files-ext.c:94): Can't dump file 5 of that type [20600] (chr 10:232)",
        r"Can't dump file (?P<fd>\d+) of that type \[\d+\] \((?P<what>(?:chr|blk) [^)]*)\)",
        "a process holds a device (descriptor {fd}, {what}), which CRIU cannot capture",
        RETRY_WARM,
    ),
    Known(
        "descriptor-kind", "capture",
        "Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])",
        r"Can't dump file (?P<fd>\d+) of that type \[\d+\] \((?P<what>.*)\)",
        "a process holds a descriptor of a kind CRIU cannot capture (descriptor {fd}, {what})",
        RETRY_WARM,
    ),
    Known(
        "old-criu-sockets", "capture",
        "Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported",
        r"Can't get 1:(16|34) opt: Operation not supported",
        "CRIU 4.1 cannot capture network sockets on kernels from 6.16 on",
        "install CRIU 4.2 or newer, or close the socket before the snapshot",
    ),
    Known(
        "old-criu-guard-pages", "capture",
        "pie: 100: Error (criu/pie/parasite.c:104): Can't splice all pages to pipe (729088/208)",
        r"Can't splice all pages to pipe",
        "memory holds guard pages (glibc 2.42 and newer make them for threads), which CRIU 4.1 cannot capture",
        "install CRIU 4.2 or newer",
    ),
    Known(
        "unix-peer-outside", "capture",
        "Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.",
        r"External socket is used|Can't dump name-less external socket|Unix socket \S+ not found",
        "a Unix socket is connected to a process outside the captured ones",
        "close that connection in a register_before_snapshot hook and connect again after the restore",
    ),
    Known(
        "unix-half-closed", "capture",
        "Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: (null); peer name: /tmp/s",
        r"Can't dump half of stream unix connection",
        "only one end of a Unix socket's connection belongs to the captured processes",
        "close that connection in a register_before_snapshot hook and connect again after the restore",
    ),
    Known(
        "tcp-connected", "both",
        "Error (criu/sk-inet.c:188): inet: Connected TCP socket, consider using --tcp-established option.",
        r"Connected TCP socket",
        "a TCP connection was opened while the processes were being captured",
        "close connections before the snapshot ends; the next capture will be tried anew",
    ),
    Known(
        "tcp-in-flight", "capture",
        "Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 5a21",
        r"In-flight connection",
        "somebody was just connecting to a socket of the captured processes",
        "let servers finish accepting before the snapshot; the next capture will be tried anew",
    ),
    Known(
        "socket-kind", "capture",
        "Error (criu/sk-inet.c:167): inet: Can't dump 5 inet socket 5a21. Only stream, dgram and raw are supported.",
        r"Only stream, dgram and raw are supported|Only stream/dgram/seqpacket are supported"
        r"|Unsupported proto \d+ for socket"
        r"|Unsupported socket family|Unable to dump a socket from an external network namespace"
        r"|Can't dump corked dgram",
        "a process holds a socket of a kind CRIU cannot capture",
        RETRY_WARM,
    ),
    Known(
        "socket-queue", "capture",
        "Error (criu/sk-queue.c:140): skqueue: Control messages in queue, not supported",
        r"Control messages in queue, not supported|Unsupported scm",
        "unread messages in a socket carry credentials or descriptors, which CRIU cannot capture",
        "read the socket empty before the snapshot",
    ),
    Known(
        "pipe-packets", "capture",
        "Error (criu/pipes.c:448): pipes: The packetized mode for pipes is not supported yet",
        r"The packetized mode for pipes is not supported",
        "a pipe is in packet mode (O_DIRECT), which CRIU cannot capture",
        RETRY_WARM,
    ),
    Known(
        "terminal", "capture",
        "Error (criu/tty.c:2265): tty: Found dangling tty with sid 105 pgid 105 (pts) on peer fd 5.",
        r"Found dangling tty|Don't have tty to inherit session|Can't find a tty driver|Unable to find a tty driver"
        r"|Too many external terminals",
        "a process holds a terminal whose other end is not captured",
        "close the terminal, or the program that runs on it, before the snapshot",
    ),
    Known(
        "inotify-path", "capture",
        "Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle",
        r"Can't dump that handle|Can't find suitable path for handle",
        "a file watch (inotify) is on a file whose path cannot be found",
        "remove watches before the snapshot and set them again after the restore",
    ),
    Known(
        "epoll-target", "capture",
        "Error (criu/eventpoll.c:218): epoll: Escaped/closed fd descriptor 7 on pid 100",
        r"Escaped/closed fd descriptor|No epoll FD for|TFD mismatch",
        "an epoll set watches a descriptor that was closed or given away",
        "remove descriptors from the epoll set before they are closed",
    ),
    Known(
        "file-lock", "both",
        "Error (criu/file-lock.c:111): Some file locks are hold by dumping tasks! You can try --file-locks to "
        "dump them.",
        r"Some file locks are hold|Can not set (flock|posix lock|ofd lock)|Unresolved lock found|Dump file lock failed"
        r"|Unknown file lock",
        "a file lock cannot be captured or taken again",
        "release locks on files in volumes before the snapshot; another instance may hold the same lock",
    ),
    Known(
        "ghost-file", "capture",
        "Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/x of 2097152 size, increase limit",
        r"Can't dump ghost file (?P<path>\S+) of (?P<size>\d+) size",
        "the deleted but open file {path} is too large to capture ({size} bytes)",
        "close deleted files before the snapshot",
    ),
    Known(
        "link-remap-exists", "capture",
        "Error (criu/files-reg.c:1169): Can't link remap to /dev/shm/link_remap.9: File exists",
        r"Can't link remap to (?P<path>\S+): File exists",
        "an earlier capture that was cut off left {path}",
        "remove that file; the next capture will be tried anew",
    ),
    Known(
        "link-remap", "capture",
        "Error (criu/files-reg.c:1122): Can't create link remap for /dev/shm/sem.x. Use link-remap option.",
        r"Can't create link remap for (?P<path>\S+)\.|Can't link remap to (?P<path2>\S+):",
        "a deleted file that is still open cannot be given a name for the capture",
        "close deleted files on read-only file systems before the snapshot",
    ),
    Known(
        "overmounted", "capture",
        "Error (criu/files-reg.c:1796): Open files on overmounted mounts are not supported yet; mount=12 fd=5 path=x",
        r"overmounted",
        "an open file lies under a file system mounted over it later",
        "close it before the snapshot",
    ),
    Known(
        "mount-unknown", "capture",
        "Error (criu/files-reg.c:1790): Can't lookup mount=1043 for fd=5 path=/x",
        r"Can't lookup mount=\S+ for fd=(?P<fd>\S+) path=(?P<path>.*)|Can't find mount mnt_id",
        "an open file lies on a file system that the sandbox does not have",
        "do not hand descriptors from outside to the worker; close it before the snapshot",
    ),
    Known(
        "pidfd", "capture",
        "Error (criu/pidfd.c:100): pidfd: PIDFD_THREAD flag is currently not supported",
        r"PIDFD_THREAD flag|pidfd: .*(outside|not supported)|Could not open pidfd for",
        "a pidfd refers to a thread or to a process outside the captured ones",
        RETRY_WARM,
    ),
    Known(
        "memfd", "both",
        "Error (criu/memfd.c:190): memfd: Can't create memfd:arena: Invalid argument",
        r"Can't create memfd:|Cannot apply seals on memfd|Can't reopen memfd",
        "a memory file (memfd) cannot be made again",
        RETRY_WARM,
    ),
    # ------------------------------------------------------------------------------------- capture: memory, processes
    Known(
        "sysv-shm", "capture",
        "Error (criu/cr-dump.c:460): Task 100 with SysVIPC shmem map @7fc5acb65000 doesn't live in IPC ns",
        r"with SysVIPC shmem map|Sysv shmem \S+ with",
        "a process uses System V shared memory (shmget), which is not captured",
        "use POSIX shared memory (multiprocessing.shared_memory), or attach it after the snapshot",
    ),
    Known(
        "hugetlb", "both",
        "Error (criu/hugetlb.c:40): hugetlb: Can't find hugetlb device",
        r"[Hh]ugetlb: .*(Can't|unsupported|not supported)|Cannot find any hugetlbfs",
        "memory in huge pages of the kernel's pool cannot be captured or had again",
        "use transparent huge pages (madvise) instead of MAP_HUGETLB",
    ),
    Known(
        "mapping-kind", "capture",
        "Error (criu/cr-dump.c:760): Unsupported mapping found 00007f5b2c000000-00007f5b2c001000",
        r"Unsupported mapping found|Can't handle non-regular mapping",
        "a process has mapped a device or another object CRIU cannot capture",
        RETRY_WARM,
    ),
    Known(
        "uprobes", "capture",
        "Error (criu/proc_parse.c:690): PID 100 has uprobes vma. Consider using --allow-uprobes.",
        r"has uprobes vma",
        "somebody on the host is tracing the process with uprobes",
        "stop the tracer; the next capture will be tried anew",
    ),
    Known(
        "aio", "capture",
        "Error (criu/aio.c:80): aio: Ring size is not aligned",
        r"Ring size is not aligned|Ring setup failed|Ring remap failed",
        "a process uses kernel asynchronous I/O (io_setup) in a way CRIU cannot capture",
        RETRY_WARM,
    ),
    Known(
        "traced", "capture",
        "Error (compel/src/lib/infect.c:263): Unseizable non-zombie 101 found, state S, err -1/10",
        r"Unseizable non-zombie (?P<pid>\d+) found",
        "process {pid} is being traced (strace, gdb, a debugger), so that CRIU cannot stop it",
        "detach the tracer; the next capture will be tried anew",
    ),
    Known(
        "freeze-timeout", "capture",
        "Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 0",
        r"Timeout reached\. Try to interrupt|task not stopped after seize|Can't freeze the tree",
        "the processes could not be stopped in time",
        "something hangs in the kernel (a dead network file system?) or starts processes without end",
    ),
    Known(
        "thread-stopped", "capture",
        "Error (compel/src/lib/infect.c:952): Individually stopped threads not supported",
        r"Individually stopped threads|unsupported stop signal|pending SIGTRAP|Zombie thread not supported"
        r"|Zombies with threads",
        "a thread is stopped by a debugger or has ended half-way",
        "let debuggers go and join threads before the snapshot",
    ),
    Known(
        "zombie", "capture",
        "Error (criu/cr-dump.c:1419): A session leader of zombie process 3301(107) is outside of its pid namespace",
        r"zombie process|Zombie with children",
        "a process has ended and nobody waits for it",
        "wait for children (subprocess.Popen.wait) before the snapshot",
    ),
    Known(
        "session-outside", "capture",
        "Error (criu/cr-dump.c:1681): A session leader of 3301(107) is outside of its pid namespace",
        r"A session leader of .* is outside|is a session leader outside",
        "a process belongs to a session started outside the captured ones",
        "start helpers from the function itself",
    ),
    Known(
        "nested-namespace", "capture",
        "Error (criu/namespaces.c:460): Can't dump nested user namespace for 101",
        r"Can't dump nested (?P<kind>\w+) namespace|Nested mount namespaces are not supported",
        "a process runs in namespaces of its own (a browser's or another sandbox)",
        "start it after the snapshot, or turn its sandbox off (for example chromium --no-sandbox)",
    ),
    Known(
        "seccomp", "both",
        "Error (compel/src/lib/infect.c:759): Kernel doesn't support PTRACE_O_SUSPEND_SECCOMP",
        r"PTRACE_O_SUSPEND_SECCOMP|couldn't suspend seccomp|Dumping seccomp filters not supported"
        r"|Can't fetch seccomp metadata|PR_SET_SECCOMP returned",
        "the kernel cannot capture or set seccomp filters",
        "the kernel needs CONFIG_CHECKPOINT_RESTORE and CONFIG_SECCOMP_FILTER, and CRIU must be root: run "
        "`woodfrog doctor`",
    ),
    Known(
        "rlimit", "capture",
        "Error (criu/cr-dump.c:520): Can't get rlimit 0: Operation not permitted",
        r"Can't get rlimit",
        "CRIU may not read the limits of a process of another user (CAP_SYS_RESOURCE is missing)",
        "all processes of a worker must have its uid; or give the daemon CAP_SYS_RESOURCE",
    ),
    # ------------------------------------------------------------------------------------- restore
    Known(
        "cpu-mismatch", "restore",
        "Error (criu/arch/x86/cpu.c:217): CPU instruction capabilities do not match run time",
        r"CPU (instruction )?capabilities do not match|CPU xfeatures has unsupported bits"
        r"|CPU xsave (max )?size mismatch"
        r"|Image carries unknown (vendor|capability)|Core march mismatch",
        "the snapshot was made on a processor with other instructions",
        "none needed: a new snapshot is made for this machine",
        at_fault=True,
    ),
    Known(
        "fpu-mismatch", "restore",
        "Error (criu/arch/x86/crtools.c:247): FPU feature required by image is not supported on host (fpu:0 "
        "fxsr:0 osxsave:0 xsaves:1)",
        r"FPU feature required by image|FPU xsave area present|Corruption in FPU|Corruption in \S+ area",
        "the snapshot was made on a processor with other floating-point or vector registers",
        "none needed: a new snapshot is made for this machine",
        at_fault=True,
    ),
    Known(
        "vdso", "both",
        "Error (criu/vdso.c:415): vdso: Unexpected rt vDSO area bounds",
        r"Unexpected rt vDSO area bounds|Can't find (rt vDSO|vDSO/VVAR)|Failed to fill (self|compat) vdso symtable"
        r"|Task had vdso, restorer doesn't|Failed to map vdso",
        "this CRIU does not know this kernel's vDSO",
        "install a newer CRIU (4.1 or newer for kernels from 6.13 on)",
    ),
    Known(
        "file-size", "restore",
        "Error (criu/files-reg.c:2144): File usr/lib/libx.so has bad size 108 (expect 54)",
        r"File (?P<path>.+) has bad size (?P<now>\d+) \(expect (?P<then>\d+)\)",
        "the file /{path} was changed since the snapshot was made (it has {now} bytes, had {then})",
        "none needed, a new snapshot is made; open files that others write after the snapshot",
        at_fault=True,
    ),
    Known(
        "file-build-id", "restore",
        "Error (criu/files-reg.c:2079): File usr/lib/libx.so has bad build-ID",
        r"File (?P<path>.+) has bad build-ID",
        "the library /{path} was replaced since the snapshot was made",
        "none needed: a new snapshot is made",
        at_fault=True,
    ),
    Known(
        "file-mode", "restore",
        "Error (criu/files-reg.c:2160): File usr/lib/libx.so has bad mode 0100600 (expect 0100644)",
        r"File (?P<path>.+) has bad mode",
        "the mode of the file /{path} was changed since the snapshot was made",
        "none needed: a new snapshot is made",
        at_fault=True,
    ),
    Known(
        "file-missing", "restore",
        "Error (criu/files-reg.c:2247): Can't open file data/index.bin on restore: No such file or directory",
        r"Can't open file (?P<path>.+?)(?: on restore)?: No such file or directory|Can't open dir (?P<dir>.+): No such",
        "a file that was open or mapped when the snapshot was made is gone ({path})",
        "put it back, or keep it in a volume or in the code; otherwise a new snapshot is made",
    ),
    Known(
        "file-denied", "restore",
        "Error (criu/files-reg.c:2247): Can't open file data/index.bin on restore: Permission denied",
        r"Can't open file (?P<path>.+?)(?: on restore)?: (Permission denied|Operation not permitted"
        r"|Read-only file system)",
        "a file that was open when the snapshot was made can no longer be opened ({path})",
        "give back its permissions; a volume that was writable must still be",
    ),
    Known(
        "pid-taken", "restore",
        "Error (criu/cr-restore.c:1230): Can't fork for 100: File exists",
        r"Can't fork for (?P<pid>\d+): File exists|Pid \d+ do not match expected|Current [gs]id \d+ intersects"
        r"|Conflict with a dead task|Thread pid mismatch|Unable to create a thread: -17",
        "a process in the sandbox already has a pid of the snapshot",
        "a snapshot needs a sandbox of its own; nothing may run there before the restore",
    ),
    Known(
        "session", "restore",
        "Error (criu/cr-restore.c:1490): Can't restore sid (105): Operation not permitted",
        r"Can't restore sid|Requested sid \d+ doesn't match|Can't restore pgid",
        "process groups and sessions cannot be made as they were",
        REPORT,
    ),
    Known(
        "socket-address", "restore",
        "Error (criu/sk-inet.c:1020): inet: Can't bind inet socket (id 7): Cannot assign requested address",
        r"Can't bind inet socket.*: (?P<why>.*)|Can't connect inet socket back: (?P<why2>.*)",
        "a network socket cannot get the address it had when the snapshot was made",
        "bind servers to 127.0.0.1 or 0.0.0.0, never to the sandbox's own address",
    ),
    Known(
        "unix-address", "restore",
        "Error (criu/sk-unix.c:1467): unix: Can't bind id 0xf ino 36101 addr /run/x.sock: Address already in use",
        r"Can't bind id \S+ ino \d+ addr (?P<path>\S+): (?P<why>.*)",
        "the Unix socket {path} cannot be bound again ({why})",
        "put sockets in /tmp, which is part of the snapshot, not in a volume that instances share",
    ),
    Known(
        "unix-external", "restore",
        "Error (criu/sk-unix.c:1912): unix: External socket found in image. Consider using the --ext-unix-sk option",
        r"External socket found in image",
        "the snapshot holds a Unix socket connected to a process outside",
        "close that connection in a register_before_snapshot hook",
        at_fault=True,
    ),
    Known(
        "image-missing", "restore",
        "Error (criu/image.c:512): Unable to open inventory.img: No such file or directory",
        r"Unable to open (?P<path>\S+\.img)|Can't open image|No (kIDs|CREDS|timestamp) |data missed for"
        r"|Couldn't open image dir",
        "an image file of the snapshot is missing",
        "it is retired and a new one made; check the disk",
        at_fault=True,
    ),
    Known(
        "image-corrupt", "restore",
        "Error (criu/image.c:563): Magic doesn't match for core-100.img",
        r"[Mm]agic doesn't match|Unexpected EOF|Img trimmed|image file was truncated|Unknown image format|[Cc]orrupt"
        r"|Failed unpacking object|Unable to unpack|Reached EOF unexpectedly|Can't read pages data"
        r"|not sorted in the image"
        r"|Short read|Inconsistent image|Read \d+ bytes while \d+ expected|No IDS for root task",
        "an image file of the snapshot is damaged",
        "it is retired and a new one made; check the disk",
        at_fault=True,
    ),
    Known(
        "image-version", "restore",
        "Error (criu/image.c:70): Not supported images version 3",
        r"Not supported images version|Too old image|too old criu|Image from old CRIU",
        "the snapshot was written by another version of CRIU",
        "none needed: a new snapshot is made",
        at_fault=True,
    ),
    Known(
        "time-namespace", "restore",
        "Error (criu/timens.c:76): Unable to create a new time namespace: Operation not permitted",
        r"time namespace|timens_offsets|monotonic clock offset|Time namespaces are not supported",
        "the clock cannot be set to go on from where it was (the machine was started anew since the snapshot)",
        "the kernel needs CONFIG_TIME_NS; otherwise a new snapshot is made",
    ),
    Known(
        "restorer-crash", "restore",
        "Error (criu/cr-restore.c:1557): 100 killed by signal 11: Segmentation fault",
        r"(?P<pid>\d+) killed by signal (?P<signal>\d+)|Restorer (fail|abnormal|stack smash)",
        "a process of the snapshot died while it was being restored",
        "if it is signal 9, the memory limit is too low for the snapshot; otherwise a new snapshot is made",
        broad=True,
    ),
    # ------------------------------------------------------------------------------------- both
    Known(
        "disk-full", "both",
        "Error (criu/bfd.c:312): bfd: Error flushing image: No space left on device",
        r"No space left on device|Disk quota exceeded",
        "the disk is full",
        "make room below woodfrog's state directory (`woodfrog snapshot list` shows sizes), or raise `disk` for "
        "files of the function",
        broad=True,
    ),
    Known(
        "out-of-memory", "both",
        "Error (criu/pstree.c:300): Can't allocate memory: Cannot allocate memory",
        r"Cannot allocate memory|Out of memory",
        "there is not enough memory",
        "raise the function's `memory`, or free memory on the machine",
        broad=True,
    ),
    Known(
        "descriptors-exhausted", "both",
        "Error (criu/files.c:900): Can't dup: Too many open files",
        r"Too many open files",
        "the processes have more descriptors open than CRIU may open",
        "raise the daemon's open files limit (LimitNOFILE, ulimit -n)",
        broad=True,
    ),
    Known(
        "not-permitted", "both",
        "Error (criu/cr-dump.c:300): Can't open 100/map_files: Operation not permitted",
        r"Operation not permitted|Permission denied|does not have CAP_",
        "CRIU lacks a right it needs",
        "run the daemon as root with all capabilities (inside a container: --privileged); `woodfrog doctor` "
        "names what is missing",
        broad=True,
    ),
    Known(
        "kernel-feature", "both",
        "Error (criu/kerndat.c:1870): kerndat_tcp_repair failed when initializing kerndat.",
        r"failed when initializing kerndat|Your kernel probably lacks|Function not implemented"
        r"|is not supported by kernel",
        "the kernel lacks something that CRIU needs",
        "the kernel needs CONFIG_CHECKPOINT_RESTORE and what `criu check` names; run `woodfrog doctor`",
        broad=True,
    ),
)  # fmt: skip

HARMLESS = re.compile(
    r"Unable to create tun|Can't setup RLIMIT_NOFILE for self|late stage hook for external plugin"
    r"|Dirty tracking is OFF|iptables-restore|nftables"
)
"""Errors that CRIU logs on its way to success."""
ECHO = re.compile(
    r"^(?:Dump \w+ \(pid: \d+\) failed|Dumping FAILED|Restoring FAILED|Can't (?:dump|restore) \w+ with parasite"
    r"|Command \d+ for daemon failed|Message reply from daemon is trimmed|Can't retrieve FDs from socket"
    r"|\d+ exited, status=|Pre-dumping FAILED|Unable to (?:open|restore) fd=)"
)
"""What the levels above say once something failed."""

_ERROR = re.compile(r"^[ \t]*(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?Error \([^)]*\): ?(?P<text>.*)$", re.MULTILINE)
_COMPILED = tuple((known, re.compile(known.pattern)) for known in TABLE)


def error_lines(log: str) -> list[str]:
    """The texts of a log's errors, in order, without time, pid and source file."""
    return [m["text"] for m in _ERROR.finditer(log)]


def tail(log: str, lines: int = 40) -> str:
    """The end of a log, for an error's `log_tail`."""
    return "\n".join(log.rstrip().splitlines()[-lines:])


def _fill(text: str, match: re.Match[str]) -> str:
    groups = {k: v for k, v in match.groupdict().items() if v}
    return re.sub(r"\{(\w+)\}", lambda m: groups.get(m[1], "?"), text).replace(" (?)", "")


def diagnose(log: str) -> Diagnosis:
    """Name the cause of a failed dump or restore from its log.

    >>> diagnose("(00.01) Error (criu/cr-dump.c:520): Can't get rlimit 0: Operation not permitted").code
    'rlimit'
    """
    lines = [line for line in error_lines(log) if not HARMLESS.search(line)]
    for broad in (False, True):
        for line in lines:
            for known, pattern in _COMPILED:
                if known.broad is broad and (match := pattern.search(line)):
                    return Diagnosis(known.code, _fill(known.cause, match), known.remedy, line.strip(), known.at_fault)
    first = next((line for line in lines if not ECHO.search(line.strip())), lines[0] if lines else "")
    if first:
        return Diagnosis("criu-unknown", f"unknown CRIU error: {first.strip()}", REPORT, first.strip())
    return Diagnosis("criu-silent", "CRIU failed and named no error", REPORT, "")


def _plain(text: str) -> str:
    """A cause without its blanks, for the documentation."""
    text = re.sub(r" ?\((?:[^()]*\{\w+\}[^()]*)\)", "", text)
    return re.sub(r"/?\{(\w+)\}", lambda m: "…" if m[1] != "path" else "*path*", text)


def markdown() -> str:
    """The table as `docs/failure-modes.md` shows it: what is seen, why, what to do."""
    titles = {"capture": "When a snapshot is made", "restore": "When a snapshot is thawed", "both": "In either"}
    out: list[str] = []
    for when, title in titles.items():
        out.append(f"### {title}\n")
        for known in TABLE:
            if known.when == when:
                retired = " The snapshot is retired." if known.at_fault else ""
                out.append(
                    f"**`{known.code}`**: {_plain(known.cause)}.{retired}\n\n"
                    f"- In CRIU's log: `{' '.join(known.seen.split())}`\n- What to do: {known.remedy}.\n"
                )
    return "\n".join(out)
