/*
 * woodfrog-pageserver: gives thawed processes their memory.
 *
 * Speaks the server's side of CRIU's lazy-pages protocol for many restores at once. For each restore it pushes the
 * recorded working set in as soon as the memory is laid out, then answers page faults with what lies around them, and
 * at last, if asked to, fills in the rest. It is started by the daemon with a user id and one end of a SOCK_SEQPACKET
 * pair as arguments, drops to that user, and opens nothing itself: every file comes over that socket.
 *
 * A restore belongs to one thread of the pool, so its state needs no lock: events of an address space and copies into
 * it are never handled out of order. (A REMOVE event that was read but not yet acted on must not be overtaken by a
 * copy of what was removed.) Only slices of the push, while no event is read, are shared by several threads.
 *
 * These threads go before all others of the machine: none of them may wait for a process or for a disk. What cannot be
 * done now (the kernel says EAGAIN while a process changes its memory) is kept and tried again a millisecond later. What
 * is not in the page cache is read by ordinary threads, the readers; when they have it, it is tried again. What is not
 * on this machine yet is asked of the daemon, who says when it is: a map tells which pages of a file are there.
 *
 * Nor do they close a page file: who does so last, when it was removed, waits for the disk. The closer does.
 *
 * Pages go through a small buffer: what lies side by side in a process is copied in at once, from however many files it
 * comes. And a page file that is cut short gives an error, where a mapped one would end this program.
 *
 * The kernel gives a process zeroes when its last userfaultfd descriptor closes. So the daemon gets a copy of each
 * before it is used, and when this program dies the processes wait, until the daemon has killed them, instead of reading
 * zeroes. When the daemon dies, its sandboxes die with it; this program waits for that before it goes.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 200
#define MAX_TASKS 65536
#define MAX_THREADS 16
#define MAX_PUSHERS 16 /* threads that push for one restore */
#define FEW_PUSHERS 4  /* and of a small one: more gain nothing */
#ifndef PIECES_A_PUSHER
#define PIECES_A_PUSHER 512 /* one more for each so many pieces: 256 MiB, as GPU memory has */
#endif
#ifndef PROCESSORS /* tests say how many there are */
#define PROCESSORS sysconf(_SC_NPROCESSORS_ONLN)
#endif
#define PAGE 4096ULL
#define INDEX_MAGIC 0x32584449474f5246ULL /* "FROGIDX2" */
#define SET_MAGIC 0x31544553474f5246ULL   /* "FROGSET1" */
#define RESTORE_FINISHED 0x52535446u
#define MAX_PIECES (1u << 20)
#define BATCH 64            /* pages copied at once: from 16 on, more gain nothing */
#define PUSH_CHUNK 128      /* pages a thread pushes before it looks whether there is an event */
#define DRAIN_CHUNK 64
#define READERS 14
#define URGENT_READERS 2    /* of these: for faults alone */
#define READ_LENGTH (256u << 10)
#define READ_GAP (64u << 10) /* to read so much in vain is cheaper than another request */
#define DRAIN_AHEAD (8u << 20)
#define AGAIN_TRIES 8
#define ZERO_AROUND (16 * PAGE)
#define EVENTS_A_TURN 64
#define RETRY_MS 1
#define FULL_US 2000000 /* so long a full memory cgroup may take to make room, by killing, say */
#define TOP_PAGE 0x7fffffffe000ULL /* never mapped */

/* ---- what goes over the control socket; native byte order, both ends are this machine ---- */

enum { CMD_RESTORE = 1, CMD_DROP = 2, CMD_WORKING_SET = 3, CMD_DRAIN = 4, CMD_PUSH = 5, CMD_HAVE = 6 };
enum {
	WITH_SET = 1,   /* there is a working set */
	PARKED = 2,     /* nothing is pushed or filled in before CMD_PUSH: a process that may never be woken */
	EVERYTHING = 4, /* push all there is, then let go */
	WITH_MAP = 8,   /* some of the files are still to come */
};
enum {
	MSG_HOLD = 1,        /* a userfaultfd to keep open; a = number of the address space */
	MSG_READY = 2,       /* the working set is in; a = pages, b = microseconds */
	MSG_WORKING_SET = 3, /* the recorded set, as a memfd; a = ranges */
	MSG_COMPLETE = 4,    /* an address space is whole, or gone: its descriptor may go; a = its number */
	MSG_FAILED = 5,      /* this restore cannot go on; a = errno, b = step, c = 1: no more memory for the process */
	MSG_STATS = 6,       /* answer to DROP: a = pages pushed, b = demand faults, c = pages by demand */
	MSG_HELD = 7,        /* the processes are about to run, and a copy of every descriptor was sent; a = how many */
	MSG_NEED = 8,        /* pages that are not here: a = place in the map, b = how many, c = 1: somebody waits for them */
};

struct command {
	uint32_t op, id;
	/* Descriptors with it: listening socket, index, working set, map and places, then the index's files in order. */
	uint32_t fds;
	uint32_t around;     /* bytes served around a fault, a power of two; HAVE: place in the map */
	uint32_t drain_ms;   /* fill in the rest so long after the start; 0xffffffff = never; HAVE: how many pages */
	uint32_t flags;      /* HAVE: errno, or 0 */
};

struct message {
	uint32_t op, id;
	uint64_t a, b, c;
};

/* ---- files ---- */

struct index_head { uint64_t magic; uint32_t tasks, files; };
struct index_task { int32_t pid; uint32_t extents; };
struct index_extent { uint64_t vaddr, pages, offset; uint32_t file, reserved; };
#define INDEX_NAME 64 /* bytes of each file's name; the daemon's, to find them */
struct set_head { uint64_t magic; uint32_t ranges, reserved; };
struct set_range { int32_t pid; uint32_t pages; uint64_t vaddr; };

struct file {
	dev_t dev;
	ino_t ino;
	uint64_t length;
	const uint8_t *present; /* a byte for each page, not 0 when it is here; NULL = all are */
	uint64_t place;         /* of its first page in the map */
	int fd, users;
	bool in_memory; /* there is nothing to wait for */
	bool tells;     /* its file system says when it would have to wait; if not, the faults of others may wait, too */
	struct file *next;
};

/* Bytes to be brought into the page cache. */
struct reading {
	struct reading *next;
	struct file *file;
	struct restore *restore;
	struct thread *thread; /* is told when they are there; NULL = nobody waits for it */
	uint64_t offset, length;
	int users, error;
	bool done, asked; /* asked: a process waits */
};

struct extent {
	uint64_t start, end, offset; /* offset in the file, bytes */
	uint64_t bit;                /* of its first page */
	struct file *file;
};

/* The address of a fault to be served again; `reading`: not before that is done. */
struct pending {
	uint64_t address;
	struct reading *reading;
};

struct space {
	struct restore *restore;
	struct space *next;
	struct extent *extents;
	size_t count, room;
	const struct extent *origin; /* the extents as they were at first, which bits are counted by */
	size_t origins;
	uint64_t *installed; /* a bit for each page of the index: it is in, or there is no place for it */
	uint64_t *wanted;    /* pages asked for by faults: the working set's record; shared with forked children */
	uint64_t bits;
	uint64_t drain_from; /* address; what lies below is filled in */
	struct pending *pending;
	size_t pendings, pending_room;
	struct timespec full_since;
	int fd;
	int32_t pid;
	uint32_t number;
	bool forked, over, gone, full, no_drain;
};

/* What one thread copies with, and what stopped it. */
struct copier {
	uint8_t *stage; /* BATCH pages */
	struct file *file;
	uint64_t offset, length; /* COLD: this has to be read first */
	int error;               /* BROKEN: errno */
};

/* A part of what is pushed: side by side in the process, from one or more files. */
struct piece {
	struct space *space;
	uint64_t vaddr;
	uint32_t pages;
};

/* A part of a file. */
struct span {
	struct file *file;
	uint64_t offset, length;
};

/* A part of the memory, as the drain takes it: in the order of the files. */
struct source {
	struct span span;
	struct space *space;
	uint64_t vaddr, bit;
};

/* Pages that a fork empties for the child, by their bits: the kernel tells nobody. */
struct wipe {
	int32_t pid;
	uint64_t bit, pages;
};

struct push {
	struct restore *restore;
	struct copier *copier;
	struct reading *reading;
	uint32_t at; /* its piece; UINT32_MAX = none */
	uint64_t copied;
	bool blocked, over, helps; /* helps: on a thread of its own */
};

struct restore {
	struct restore *next;
	struct thread *thread;
	struct space *spaces;
	struct piece *pieces;
	struct span *spans; /* where the pieces come from */
	struct wipe *wipes;
	struct file **files;
	uint32_t id, count, span_count, wipe_count, opened, around, drain_ms, numbers;
	int listener, connection;
	int32_t expect_pid; /* a descriptor for this task comes next; 0 = a pid comes */
	union { char bytes[4]; uint32_t whole; } word;
	uint32_t word_has;
	bool finished, failed, pushing, parked, everything;
	uint32_t next_piece;
	bool pause;
	struct push parts[MAX_PUSHERS];
	struct source *sources;
	size_t source_count, source_at, source_ahead;
	bool sources_made;
	struct reading *drain_reading;
	uint64_t pushed, faults, demanded;
	struct timespec began;
	/* handed over by the main thread */
	struct space *prepared;
};

struct job {
	struct job *next;
	struct command command;
	struct restore *restore;
};

struct thread {
	pthread_t handle;
	int epoll, wake;
	pthread_mutex_t lock;
	struct job *jobs;
	struct restore *restores;
	struct space *dead; /* freed when no event of this round can point to them any more */
	struct copier copiers[MAX_PUSHERS]; /* its own, and those of who helps it push */
	uint32_t turn;
	int load;
};

static int control_fd;
static struct thread threads[MAX_THREADS];
static int thread_count, pusher_count;
static pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static struct file *files, *closing;
static pthread_cond_t closing_wake = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t send_lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t micros(const struct timespec *from)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)(now.tv_sec - from->tv_sec) * 1000000 + (uint64_t)((now.tv_nsec - from->tv_nsec) / 1000);
}

static bool say(uint32_t op, uint32_t id, uint64_t a, uint64_t b, uint64_t c, int fd)
{
	struct message text = { op, id, a, b, c };
	struct iovec part = { &text, sizeof text };
	union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { 0 };
	struct msghdr head = { .msg_iov = &part, .msg_iovlen = 1 };
	if (fd >= 0) {
		head.msg_control = control.space;
		head.msg_controllen = sizeof control.space;
		struct cmsghdr *c_head = CMSG_FIRSTHDR(&head);
		c_head->cmsg_level = SOL_SOCKET;
		c_head->cmsg_type = SCM_RIGHTS;
		c_head->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(c_head), &fd, sizeof fd);
	}
	bool sent = false;
	pthread_mutex_lock(&send_lock);
	/* Too many descriptors on their way (ETOOMANYREFS): the daemon has to take some first. */
	for (int tries = 0; !sent && tries < 200; tries++) {
		sent = sendmsg(control_fd, &head, MSG_NOSIGNAL) >= 0;
		if (!sent && (errno == EPIPE || errno == ECONNRESET))
			break;
		if (!sent && errno != EINTR)
			nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
	}
	pthread_mutex_unlock(&send_lock);
	return sent;
}

/* ---- the page files: open once for all restores ---- */

#define HERE UINT64_MAX /* a place: the file is whole */

/* What tells which pages are here; the daemon writes it. One for all, and never unmapped: files point into it. */
static struct { dev_t dev; ino_t ino; uint64_t length; const uint8_t *bytes; } map;

static bool map_open(int fd)
{
	struct stat info;
	if (fstat(fd, &info) || !S_ISREG(info.st_mode))
		return false;
	if (map.bytes)
		return map.dev == info.st_dev && map.ino == info.st_ino;
	int seals = fcntl(fd, F_GET_SEALS); /* it must not become shorter under our feet */
	if (seals < 0 || !(seals & F_SEAL_SHRINK) || info.st_size <= 0)
		return false;
	void *bytes = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (bytes == MAP_FAILED)
		return false;
	map.dev = info.st_dev;
	map.ino = info.st_ino;
	map.length = (uint64_t)info.st_size;
	map.bytes = bytes;
	return true;
}

/* How many bytes from `offset` on are here, at most `length`; both are multiples of a page. */
static uint64_t file_has(const struct file *file, uint64_t offset, uint64_t length)
{
	uint64_t has = 0;
	if (!file->present)
		return length;
	/* What the daemon wrote before it set the byte is there for who sees it set. */
	while (has < length && __atomic_load_n(&file->present[(offset + has) / PAGE], __ATOMIC_ACQUIRE))
		has += PAGE;
	return has < length ? has : length;
}

static struct file *file_open(int fd, uint64_t place)
{
	struct stat info;
	struct statfs system;
	if (fstat(fd, &info) || !S_ISREG(info.st_mode) || fstatfs(fd, &system))
		return NULL;
	uint64_t pages = ((uint64_t)info.st_size + PAGE - 1) / PAGE;
	if (place != HERE && (!map.bytes || place > map.length || pages > map.length - place))
		return NULL;
	pthread_mutex_lock(&files_lock);
	struct file *file = files;
	while (file && !(file->dev == info.st_dev && file->ino == info.st_ino && file->length == (uint64_t)info.st_size))
		file = file->next;
	int copy = -1;
	if (!file && (copy = fcntl(fd, F_DUPFD_CLOEXEC, 0)) >= 0 && (file = calloc(1, sizeof *file))) {
		char byte;
		struct iovec part = { &byte, 1 };
		file->dev = info.st_dev;
		file->ino = info.st_ino;
		file->length = (uint64_t)info.st_size;
		file->present = place == HERE ? NULL : map.bytes + place;
		file->place = place;
		file->fd = copy;
		file->in_memory = system.f_type == TMPFS_MAGIC;
		file->tells = preadv2(fd, &part, 1, 0, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP;
		file->next = files;
		files = file;
	} else if (copy >= 0)
		close(copy);
	if (file)
		file->users++;
	pthread_mutex_unlock(&files_lock);
	return file;
}

static struct file *file_share(struct file *file)
{
	pthread_mutex_lock(&files_lock);
	file->users++;
	pthread_mutex_unlock(&files_lock);
	return file;
}

static void file_close(struct file *file)
{
	if (!file)
		return;
	pthread_mutex_lock(&files_lock);
	if (--file->users == 0) {
		for (struct file **at = &files; *at; at = &(*at)->next)
			if (*at == file) {
				*at = file->next;
				break;
			}
		file->next = closing;
		closing = file;
		pthread_cond_signal(&closing_wake);
	}
	pthread_mutex_unlock(&files_lock);
}

/*
 * A thread that only closes files. With a file that was removed meanwhile goes its space on the disk: that may take the
 * kernel seconds for a gigabyte, and no process waits for it then.
 */
static void *closer(void *argument)
{
	(void)argument;
	for (;;) {
		pthread_mutex_lock(&files_lock);
		while (!closing)
			pthread_cond_wait(&closing_wake, &files_lock);
		struct file *file = closing;
		closing = file->next;
		pthread_mutex_unlock(&files_lock);
		close(file->fd);
		free(file);
	}
	return NULL;
}

/* ---- reading from disk, on threads that may wait for it ---- */

static pthread_mutex_t readers_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t urgent_wake = PTHREAD_COND_INITIALIZER, later_wake = PTHREAD_COND_INITIALIZER;
static struct { struct reading *first, **last; } urgent = { NULL, &urgent.first }, later = { NULL, &later.first };
static struct reading *absent; /* these wait for the daemon */

static void wake(struct thread *thread)
{
	uint64_t one = 1;
	while (write(thread->wake, &one, sizeof one) < 0 && errno == EINTR)
		;
}

static void reading_put(struct reading *reading)
{
	if (reading && __atomic_sub_fetch(&reading->users, 1, __ATOMIC_ACQ_REL) == 0) {
		file_close(reading->file);
		free(reading);
	}
}

/* NULL: no memory. With a thread, somebody waits for it: it goes first, and is the caller's to put. */
static struct reading *reading_start(struct restore *restore, struct span span, struct thread *thread, bool asked)
{
	struct reading *reading = calloc(1, sizeof *reading);
	if (!reading)
		return NULL;
	reading->file = file_share(span.file);
	reading->offset = span.offset;
	reading->length = span.length;
	reading->restore = restore;
	reading->thread = thread;
	reading->asked = asked;
	reading->users = thread ? 2 : 1;
	pthread_mutex_lock(&readers_lock);
	if (thread) {
		*urgent.last = reading;
		urgent.last = &reading->next;
		pthread_cond_signal(&urgent_wake);
	} else {
		*later.last = reading;
		later.last = &reading->next;
	}
	pthread_cond_signal(&later_wake);
	pthread_mutex_unlock(&readers_lock);
	return reading;
}

static bool reading_done(const struct reading *reading)
{
	return !reading || __atomic_load_n(&reading->done, __ATOMIC_ACQUIRE);
}

/* Forget what was only to be read ahead for a restore, and what is not here. */
static void readings_forget(const struct restore *restore)
{
	struct reading *dropped = NULL;
	pthread_mutex_lock(&readers_lock);
	later.last = &later.first;
	for (struct reading *reading = later.first; reading;) {
		struct reading *next = reading->next;
		if (reading->restore == restore) {
			reading->next = dropped;
			dropped = reading;
		} else {
			*later.last = reading;
			later.last = &reading->next;
		}
		reading = next;
	}
	*later.last = NULL;
	for (struct reading **at = &absent; *at;) {
		struct reading *reading = *at;
		if (reading->restore == restore) {
			*at = reading->next;
			reading->next = dropped;
			dropped = reading;
		} else
			at = &reading->next;
	}
	pthread_mutex_unlock(&readers_lock);
	while (dropped) {
		struct reading *next = dropped->next;
		reading_put(dropped);
		dropped = next;
	}
}

static void reading_over(struct reading *reading)
{
	struct thread *thread = reading->thread;
	__atomic_store_n(&reading->done, true, __ATOMIC_RELEASE);
	reading_put(reading);
	if (thread)
		wake(thread);
}

/* Whether a reading cannot be done now: then the daemon is asked, and it is taken up again when it has answered. */
static bool reading_lacks(struct reading *reading)
{
	if (file_has(reading->file, reading->offset, reading->length) == reading->length)
		return false;
	if (!reading->thread) {
		reading_put(reading); /* to read ahead what may never be asked for is the daemon's matter */
		return true;
	}
	uint64_t place = reading->file->place + reading->offset / PAGE, pages = reading->length / PAGE;
	bool asked = reading->asked;
	pthread_mutex_lock(&readers_lock);
	/* Once more, and with the lock: an answer that comes now finds it. */
	bool lacks = file_has(reading->file, reading->offset, reading->length) != reading->length;
	if (lacks) {
		reading->next = absent;
		absent = reading;
	}
	pthread_mutex_unlock(&readers_lock);
	if (lacks)
		say(MSG_NEED, 0, place, pages, asked, -1);
	return lacks;
}

/* The daemon's answer: these pages are here, or cannot be had. */
static void readings_have(uint64_t place, uint64_t pages, int error)
{
	struct reading *over = NULL;
	pthread_mutex_lock(&readers_lock);
	for (struct reading **at = &absent; *at;) {
		struct reading *reading = *at;
		uint64_t from = reading->file->place + reading->offset / PAGE, to = from + reading->length / PAGE;
		if (error && from < place + pages && place < to) {
			*at = reading->next;
			reading->error = error;
			reading->next = over;
			over = reading;
		} else if (!error && file_has(reading->file, reading->offset, reading->length) == reading->length) {
			*at = reading->next;
			reading->next = NULL;
			*urgent.last = reading;
			urgent.last = &reading->next;
			pthread_cond_signal(&urgent_wake);
			pthread_cond_signal(&later_wake);
		} else
			at = &reading->next;
	}
	pthread_mutex_unlock(&readers_lock);
	while (over) {
		struct reading *next = over->next;
		reading_over(over);
		over = next;
	}
}

static bool is_here(int fd, uint64_t at)
{
	char byte;
	struct iovec part = { &byte, 1 };
	return preadv2(fd, &part, 1, (off_t)at, RWF_NOWAIT) == 1;
}

/*
 * Plain reads, from several threads one after the other: so the kernel's own read-ahead sees one stream and asks for
 * much at a time. Its readahead() has small pages made, one by one, and is half as fast.
 */
static void read_in(struct reading *reading, uint8_t *scratch)
{
	int fd = reading->file->fd;
	uint64_t end = reading->offset + reading->length;
	for (uint64_t at = reading->offset; at < end && !reading->error;) {
		uint64_t length = end - at < READ_LENGTH ? end - at : READ_LENGTH;
		if (!reading->thread && is_here(fd, at) && is_here(fd, at + length - 1)) {
			at += length; /* the rest is here, too, or it will be asked for */
			continue;
		}
		ssize_t got = pread(fd, scratch, length, (off_t)at);
		if (got > 0)
			at += (uint64_t)got;
		else if (!got || errno != EINTR)
			reading->error = got ? errno : EIO;
	}
}

static void *reader(void *argument)
{
	static uint8_t scratches[READERS][READ_LENGTH];
	const uintptr_t number = (uintptr_t)argument;
	const bool only_urgent = number < URGENT_READERS;
	for (;;) {
		pthread_mutex_lock(&readers_lock);
		while (!urgent.first && (only_urgent || !later.first))
			pthread_cond_wait(only_urgent ? &urgent_wake : &later_wake, &readers_lock);
		struct reading *reading = urgent.first;
		if (reading) {
			if (!(urgent.first = reading->next))
				urgent.last = &urgent.first;
		} else {
			reading = later.first;
			if (!(later.first = reading->next))
				later.last = &later.first;
		}
		pthread_mutex_unlock(&readers_lock);
		reading->next = NULL;
		if (reading_lacks(reading))
			continue;
		read_in(reading, scratches[number]);
		reading_over(reading);
	}
	return NULL;
}

static bool readers_start(void)
{
	pthread_attr_t ordinary;
	struct sched_param none = { 0 };
	if (pthread_attr_init(&ordinary))
		return false;
	pthread_attr_setinheritsched(&ordinary, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&ordinary, SCHED_OTHER);
	pthread_attr_setschedparam(&ordinary, &none);
	bool ok = true;
	for (int i = 0; ok && i < READERS; i++) {
		pthread_t handle;
		bool only_urgent = i < URGENT_READERS;
		ok = pthread_create(&handle, only_urgent ? NULL : &ordinary, reader, (void *)(uintptr_t)i) == 0;
	}
	pthread_t handle;
	ok = ok && pthread_create(&handle, &ordinary, closer, NULL) == 0;
	pthread_attr_destroy(&ordinary);
	return ok;
}

static int span_order(const void *left, const void *right)
{
	const struct span *a = left, *b = right;
	if (a->file != b->file)
		return a->file < b->file ? -1 : 1;
	return a->offset < b->offset ? -1 : a->offset > b->offset;
}

/* Have read ahead what lies in the spans, which are in order: in large requests, many at a time. */
static void read_ahead(struct restore *restore, const struct span *spans, size_t count)
{
	struct span together = { 0 };
	for (size_t i = 0; i <= count; i++) {
		const struct span *next = i < count ? &spans[i] : NULL;
		if (next && next->file == together.file && next->offset <= together.offset + together.length + READ_GAP &&
		    next->offset + next->length - together.offset <= READ_LENGTH) {
			if (next->offset + next->length > together.offset + together.length)
				together.length = next->offset + next->length - together.offset;
			continue;
		}
		for (uint64_t at = 0; at < together.length && !together.file->in_memory; at += READ_LENGTH) {
			uint64_t length = together.length - at < READ_LENGTH ? together.length - at : READ_LENGTH;
			reading_start(restore, (struct span){ together.file, together.offset + at, length }, NULL, false);
		}
		if (next)
			together = *next;
	}
}

/* ---- address spaces ---- */

static bool bit_get(const uint64_t *bits, uint64_t n)
{
	return __atomic_load_n(&bits[n / 64], __ATOMIC_RELAXED) >> (n % 64) & 1;
}

static void bits_set(uint64_t *bits, uint64_t from, uint64_t count)
{
	while (count) {
		uint64_t low = from % 64, take = 64 - low < count ? 64 - low : count;
		uint64_t mask = (take == 64 ? ~0ULL : (1ULL << take) - 1) << low;
		__atomic_fetch_or(&bits[from / 64], mask, __ATOMIC_RELAXED);
		from += take;
		count -= take;
	}
}

static struct extent *extent_at(struct space *space, uint64_t address)
{
	size_t low = 0, high = space->count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (space->extents[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < space->count && space->extents[low].start <= address ? &space->extents[low] : NULL;
}

static size_t extent_after(struct space *space, uint64_t address)
{
	size_t low = 0, high = space->count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (space->extents[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Make room for `more` extents at `at`. */
static bool extents_open(struct space *space, size_t at, size_t more)
{
	if (space->count + more > space->room) {
		size_t room = 2 * space->room + more + 16;
		struct extent *grown = realloc(space->extents, room * sizeof *grown);
		if (!grown)
			return false;
		space->extents = grown;
		space->room = room;
	}
	memmove(space->extents + at + more, space->extents + at, (space->count - at) * sizeof *space->extents);
	space->count += more;
	return true;
}

/* What of an extent lies from `start` on. */
static struct extent extent_from(struct extent e, uint64_t start)
{
	e.offset += start - e.start;
	e.bit += (start - e.start) / PAGE;
	e.start = start;
	return e;
}

/* Forget what lies in [start, end): it is the process's own from now on. */
static bool extents_cut(struct space *space, uint64_t start, uint64_t end)
{
	size_t i = extent_after(space, start), k;
	if (i < space->count && space->extents[i].start < start) {
		struct extent before = space->extents[i];
		if (before.end > end && !extents_open(space, i, 1))
			return false;
		space->extents[i++].end = start;
		if (before.end > end) {
			space->extents[i] = extent_from(before, end);
			return true;
		}
	}
	for (k = i; k < space->count && space->extents[k].end <= end;)
		k++;
	if (k < space->count && space->extents[k].start < end)
		space->extents[k] = extent_from(space->extents[k], end);
	if (k > i)
		memmove(space->extents + i, space->extents + k, (space->count - k) * sizeof *space->extents);
	space->count -= k - i;
	return true;
}

static bool extents_move(struct space *space, uint64_t from, uint64_t to, uint64_t length)
{
	size_t first = extent_after(space, from), last = first;
	while (last < space->count && space->extents[last].start < from + length)
		last++;
	size_t taken = last - first;
	struct extent *moved = malloc(taken * sizeof *moved + 1);
	if (!moved)
		return false;
	for (size_t i = 0; i < taken; i++) {
		struct extent e = space->extents[first + i];
		if (e.start < from)
			e = extent_from(e, from);
		if (e.end > from + length)
			e.end = from + length;
		e.start = e.start - from + to;
		e.end = e.end - from + to;
		moved[i] = e;
	}
	bool ok = extents_cut(space, from, from + length) && extents_cut(space, to, to + length);
	if (ok && taken) {
		size_t at = extent_after(space, to);
		if (moved[0].start < space->drain_from)
			space->drain_from = moved[0].start;
		if ((ok = extents_open(space, at, taken)))
			memcpy(space->extents + at, moved, taken * sizeof *moved);
	}
	free(moved);
	return ok;
}

static void pendings_drop(struct space *space)
{
	for (size_t i = 0; i < space->pendings; i++)
		reading_put(space->pending[i].reading);
	free(space->pending);
	space->pending = NULL;
	space->pendings = 0;
}

static void space_free(struct space *space)
{
	if (!space)
		return;
	if (space->fd >= 0) {
		/* The daemon has the same file open, so closing alone would leave it watched. */
		epoll_ctl(space->restore->thread->epoll, EPOLL_CTL_DEL, space->fd, NULL);
		close(space->fd);
	}
	if (!space->forked) {
		free(space->wanted);
		free((void *)space->origin);
	}
	free(space->extents);
	free(space->installed);
	pendings_drop(space);
	free(space);
}

/* The process is gone, or whole: nothing is left to do for it, and no descriptor needs to be held. */
static void space_over(struct space *space)
{
	if (space->over)
		return;
	space->over = true;
	epoll_ctl(space->restore->thread->epoll, EPOLL_CTL_DEL, space->fd, NULL);
	close(space->fd);
	space->fd = -1;
	free(space->extents);
	free(space->installed);
	pendings_drop(space);
	space->extents = NULL;
	space->installed = NULL;
	space->count = 0;
	say(MSG_COMPLETE, space->restore->id, space->number, 0, 0, -1);
}

/* Nothing is served any more; the processes wait, their descriptors open, until the daemon has killed them. */
static void restore_failed_of(struct restore *restore, int error, int step, bool no_memory)
{
	if (restore->failed)
		return;
	restore->failed = true;
	int epoll = restore->thread->epoll;
	for (struct space *space = restore->spaces; space; space = space->next)
		if (space->fd >= 0)
			epoll_ctl(epoll, EPOLL_CTL_DEL, space->fd, NULL);
	if (restore->listener >= 0)
		epoll_ctl(epoll, EPOLL_CTL_DEL, restore->listener, NULL);
	if (restore->connection >= 0)
		epoll_ctl(epoll, EPOLL_CTL_DEL, restore->connection, NULL);
	say(MSG_FAILED, restore->id, (uint64_t)error, (uint64_t)step, no_memory, -1);
}

static void restore_failed(struct restore *restore, int error, int step)
{
	restore_failed_of(restore, error, step, false);
}

/*
 * AGAIN: an event has to be read first. FULL: the process may not have more memory. COLD: it has to be read from disk
 * first.
 */
enum outcome { DONE, AGAIN, FULL, GONE, COLD, BROKEN };

/* Pages that lie side by side in the process. */
struct batch {
	uint64_t address;
	uint32_t pages;
	uint64_t bit[BATCH];
};

/* Copy pages [from, to) of a batch in. */
static enum outcome install(struct space *space, const struct batch *batch, uint32_t from, uint32_t to, uint64_t *copied,
			    struct copier *copier)
{
	for (int tries = 0; from < to;) {
		struct uffdio_copy copy = {
			.dst = batch->address + from * PAGE,
			.src = (uint64_t)(uintptr_t)copier->stage + from * PAGE,
			.len = (to - from) * PAGE,
		};
		int failed = ioctl(space->fd, UFFDIO_COPY, &copy) ? errno : 0;
		uint32_t done = copy.copy > 0 ? (uint32_t)((uint64_t)copy.copy / PAGE) : 0;
		*copied += done;
		for (; done; done--)
			bits_set(space->installed, batch->bit[from++], 1);
		if (!failed || copy.copy > 0)
			continue; /* after a part the kernel says EAGAIN whatever the reason is: the next try tells */
		switch (failed) {
		case EEXIST: /* the process, or an earlier copy, was first */
			bits_set(space->installed, batch->bit[from++], 1);
			break;
		case ENOENT: /* a seam between two maps, or a map that is not ours */
			if (to - from > 1) {
				uint32_t middle = from + (to - from) / 2;
				enum outcome half = install(space, batch, from, middle, copied, copier);
				if (half != DONE)
					return half;
				from = middle;
			} else if (ioctl(space->fd, UFFDIO_COPY, &copy) && errno == ENOENT) {
				/*
				 * Had the map gone by a change whose event is still to be read, EAGAIN would have come this time;
				 * so there is no such map.
				 */
				bits_set(space->installed, batch->bit[from++], 1);
			} /* else it is in now, or the next try tells */
			break;
		case EAGAIN: /* an event waits to be read, or the other thread that pushes came between */
			if (++tries < AGAIN_TRIES)
				break;
			return AGAIN;
		case ENOMEM:
			return FULL;
		case ESRCH:
			return GONE;
		default:
			copier->error = failed;
			return BROKEN;
		}
	}
	return DONE;
}

/* Read pages without waiting for the disk, or for what is still to come; `pages` becomes how many there were. */
static enum outcome fetch(struct copier *copier, struct file *file, uint64_t offset, uint32_t at, uint32_t *pages)
{
	uint64_t done = 0, wanted = *pages * PAGE, length = file_has(file, offset, wanted);
	while (done < length) {
		struct iovec part = { copier->stage + at * PAGE + done, length - done };
		ssize_t got = preadv2(file->fd, &part, 1, (off_t)(offset + done), file->tells ? RWF_NOWAIT : 0);
		if (got > 0) {
			done += (uint64_t)got;
			continue;
		}
		if (got < 0 && errno == EINTR)
			continue;
		*pages = (uint32_t)(done / PAGE);
		if (got < 0 && errno == EAGAIN) {
			done -= done % PAGE;
			copier->file = file;
			copier->offset = offset + done;
			copier->length = wanted - done;
			return COLD;
		}
		copier->error = got ? errno : EIO; /* the file ends early */
		return BROKEN;
	}
	if (length == wanted)
		return DONE;
	*pages = (uint32_t)(length / PAGE);
	copier->file = file;
	copier->offset = offset + length;
	copier->length = wanted - length;
	return COLD;
}

/* Copy what is missing of [start, end) in, over all extents there. */
static enum outcome fill(struct space *space, uint64_t start, uint64_t end, uint64_t *copied, struct copier *copier)
{
	struct batch batch;
	batch.pages = 0;
	for (size_t i = extent_after(space, start); i < space->count && space->extents[i].start < end; i++) {
		const struct extent *e = &space->extents[i];
		uint64_t at = e->start > start ? e->start : start, stop = e->end < end ? e->end : end;
		while (at < stop) {
			uint64_t bit = e->bit + (at - e->start) / PAGE;
			if (bit_get(space->installed, bit)) {
				at += PAGE;
				continue;
			}
			if (batch.pages && (batch.pages == BATCH || batch.address + batch.pages * PAGE != at)) {
				enum outcome outcome = install(space, &batch, 0, batch.pages, copied, copier);
				if (outcome != DONE)
					return outcome;
				batch.pages = 0;
			}
			if (!batch.pages)
				batch.address = at;
			uint32_t pages = 1;
			while (batch.pages + pages < BATCH && at + pages * PAGE < stop && !bit_get(space->installed, bit + pages))
				pages++;
			enum outcome outcome = fetch(copier, e->file, e->offset + (at - e->start), batch.pages, &pages);
			for (uint32_t k = 0; k < pages; k++)
				batch.bit[batch.pages++] = bit + k;
			if (outcome != DONE) {
				int error = copier->error;
				enum outcome first = batch.pages ? install(space, &batch, 0, batch.pages, copied, copier) : DONE;
				if (first != DONE)
					return first;
				copier->error = error;
				return outcome;
			}
			at += pages * PAGE;
		}
	}
	return batch.pages ? install(space, &batch, 0, batch.pages, copied, copier) : DONE;
}

static enum outcome zero_in(struct space *space, uint64_t address, uint64_t length)
{
	for (;;) {
		struct uffdio_zeropage zero = { .range = { address, length } };
		if (!ioctl(space->fd, UFFDIO_ZEROPAGE, &zero) || zero.zeropage > 0)
			return DONE;
		switch (errno) {
		case EAGAIN:
			return AGAIN;
		case ENOMEM:
			return FULL;
		case ESRCH:
			return GONE;
		case EEXIST: {
			struct uffdio_range range = { address, PAGE };
			ioctl(space->fd, UFFDIO_WAKE, &range);
			return DONE;
		}
		case ENOENT:
			if (length == PAGE)
				return DONE; /* unmapped meanwhile */
			break;
		default:
			if (length == PAGE)
				return BROKEN;
		}
		length = PAGE; /* the neighbours are another map's: this page alone */
	}
}

static enum outcome serve_fault(struct space *space, uint64_t address)
{
	struct restore *restore = space->restore;
	struct copier *copier = &restore->thread->copiers[0];
	address &= ~(PAGE - 1);
	struct extent *found = extent_at(space, address);
	if (!found) {
		/* Zero pages up to what comes next: a heap that grows asks for one after the other. */
		size_t next = extent_after(space, address);
		uint64_t length = ZERO_AROUND - (address & (ZERO_AROUND - 1));
		if (next < space->count && space->extents[next].start - address < length)
			length = space->extents[next].start - address;
		enum outcome outcome = zero_in(space, address, length);
		copier->error = errno;
		return outcome;
	}
	restore->faults++;
	/* It is in by now; or the process lost it in a way that no event tells of (MADV_WIPEONFORK): zeroes. */
	if (bit_get(space->installed, found->bit + (address - found->start) / PAGE)) {
		enum outcome outcome = zero_in(space, address, PAGE);
		copier->error = errno;
		return outcome;
	}
	uint64_t around = restore->around, start = address & ~(around - 1), end = start + around;
	/* The page itself first: its thread waits. */
	uint64_t before = restore->demanded;
	enum outcome outcome = fill(space, address, address + PAGE, &restore->demanded, copier);
	if (outcome == COLD) {
		uint64_t from = found->start > start ? found->start : start, to = found->end < end ? found->end : end;
		copier->offset = found->offset + (from - found->start);
		copier->length = to - from;
	}
	if (outcome != DONE)
		return outcome;
	/* All that goes in is the working set's: what is touched next without a fault would not be seen otherwise. */
	for (size_t i = extent_after(space, start); i < space->count && space->extents[i].start < end; i++) {
		const struct extent *e = &space->extents[i];
		uint64_t from = e->start > start ? e->start : start, to = e->end < end ? e->end : end;
		bits_set(space->wanted, e->bit + (from - e->start) / PAGE, (to - from) / PAGE);
	}
	if (restore->demanded == before) {
		struct uffdio_range range = { address, PAGE };
		ioctl(space->fd, UFFDIO_WAKE, &range);
	}
	/* What lies around it was not asked for; whether that works out, a fault will tell. */
	if (around > PAGE && fill(space, start, end, &restore->demanded, copier) == GONE)
		return GONE;
	return DONE;
}

static bool space_wait(struct space *space, uint64_t address, struct reading *reading)
{
	if (space->pendings == space->pending_room || !space->pending) {
		size_t room = space->pending ? space->pending_room * 2 : 16;
		struct pending *grown = realloc(space->pending, room * sizeof *grown);
		if (!grown)
			return false;
		space->pending = grown;
		space->pending_room = room;
	}
	space->pending[space->pendings++] = (struct pending){ address, reading };
	return true;
}

/* Serve a fault, or keep it for later. */
static void space_fault(struct space *space, uint64_t address)
{
	struct restore *restore = space->restore;
	struct copier *copier = &restore->thread->copiers[0];
	struct reading *reading = NULL;
	switch (serve_fault(space, address)) {
	case DONE:
		space->full = false;
		return;
	case FULL:
		if (!space->full)
			clock_gettime(CLOCK_MONOTONIC, &space->full_since);
		space->full = true;
		if (micros(&space->full_since) > FULL_US) {
			restore_failed_of(restore, ENOMEM, 1, true);
			return;
		}
		break;
	case AGAIN:
		break;
	case COLD: {
		struct span span = { copier->file, copier->offset, copier->length };
		if (!(reading = reading_start(restore, span, restore->thread, true))) {
			restore_failed(restore, ENOMEM, 2);
			return;
		}
		break;
	}
	case GONE:
		space_over(space);
		return;
	case BROKEN:
		restore_failed(restore, copier->error, 1);
		return;
	}
	if (!space_wait(space, address, reading)) {
		reading_put(reading);
		restore_failed(restore, ENOMEM, 2);
	}
}

static void space_retry(struct space *space)
{
	struct pending *old = space->pending;
	size_t count = space->pendings;
	space->pending = NULL;
	space->pendings = 0;
	for (size_t i = 0; i < count; i++) {
		uint64_t address = old[i].address;
		struct reading *reading = old[i].reading;
		if (!space->over && !space->restore->failed && !reading_done(reading)) {
			if (space_wait(space, address, reading))
				continue;
			restore_failed(space->restore, ENOMEM, 2);
		}
		int error = reading_done(reading) && reading ? reading->error : 0;
		reading_put(reading);
		if (space->over || space->restore->failed)
			continue;
		if (error)
			restore_failed(space->restore, error, 1);
		else
			space_fault(space, address);
	}
	free(old);
}

enum { KIND_SPACE = 0, KIND_LISTENER = 1, KIND_CONNECTION = 2, KIND_WAKE = 3 }; /* in the low bits of a pointer */

static bool watch(struct thread *thread, int fd, void *what, int kind)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = (uint64_t)(uintptr_t)what | (uint64_t)kind };
	return epoll_ctl(thread->epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

/* From here on the daemon has a copy of the descriptor: what happens when this program dies depends on it. */
static void space_begin(struct space *space)
{
	struct restore *restore = space->restore;
	space->next = restore->spaces;
	restore->spaces = space;
	fcntl(space->fd, F_SETFL, O_NONBLOCK);
	if (!say(MSG_HOLD, restore->id, space->number, 0, 0, space->fd))
		restore_failed(restore, errno, 6);
	else if (!restore->failed && !watch(restore->thread, space->fd, space, KIND_SPACE))
		restore_failed(restore, errno, 6);
}

static struct space *space_fork(struct space *parent, int fd)
{
	struct space *child = calloc(1, sizeof *child);
	size_t bytes = (parent->bits + 63) / 64 * 8;
	if (!child)
		return NULL;
	*child = *parent;
	child->fd = fd;
	child->forked = true;
	child->full = child->gone = false;
	child->pending = NULL;
	child->pendings = child->pending_room = 0;
	child->number = parent->restore->numbers++;
	child->room = parent->count;
	child->extents = malloc(parent->count * sizeof *child->extents + 1);
	child->installed = malloc(bytes + 8);
	if (!child->extents || !child->installed) {
		free(child->extents);
		free(child->installed);
		free(child);
		return NULL;
	}
	memcpy(child->extents, parent->extents, parent->count * sizeof *child->extents);
	memcpy(child->installed, parent->installed, bytes);
	for (uint32_t i = 0; i < parent->restore->wipe_count; i++) {
		const struct wipe *wipe = &parent->restore->wipes[i];
		if (wipe->pid == parent->pid)
			bits_set(child->installed, wipe->bit, wipe->pages);
	}
	return child;
}

/* Nothing tells when a child ends: a program that starts many would keep all their descriptors open. */
static void reap(struct restore *restore)
{
	for (struct space **at = &restore->spaces; *at;) {
		struct space *space = *at;
		struct uffdio_zeropage probe = { .range = { TOP_PAGE, PAGE } };
		if (space->forked && !space->over && ioctl(space->fd, UFFDIO_ZEROPAGE, &probe) && errno == ESRCH)
			space_over(space);
		if (space->forked && space->over) {
			*at = space->next;
			space->next = restore->thread->dead;
			restore->thread->dead = space;
		} else
			at = &space->next;
	}
}

/*
 * Read and carry out what the kernel tells of one address space. One at a time: reading an event lets the process go
 * on, so nothing may be copied between that and acting on it.
 */
static void space_events(struct space *space)
{
	struct restore *restore = space->restore;
	for (int i = 0; i < EVENTS_A_TURN && !space->over && !restore->failed; i++) {
		struct uffd_msg event;
		ssize_t got = read(space->fd, &event, sizeof event);
		if (got != (ssize_t)sizeof event) {
			if (got < 0 && errno != EAGAIN && errno != EINTR)
				restore_failed(restore, errno, 3); /* no descriptor for a child, perhaps */
			return;
		}
		bool ok = true;
		switch (event.event) {
		case UFFD_EVENT_PAGEFAULT:
			space_fault(space, event.arg.pagefault.address);
			break;
		case UFFD_EVENT_REMOVE:
		case UFFD_EVENT_UNMAP:
			ok = extents_cut(space, event.arg.remove.start, event.arg.remove.end);
			break;
		case UFFD_EVENT_REMAP:
			ok = extents_move(space, event.arg.remap.from, event.arg.remap.to, event.arg.remap.len);
			break;
		case UFFD_EVENT_FORK: {
			struct space *child = space_fork(space, (int)event.arg.fork.ufd);
			if (child)
				space_begin(child);
			else
				ok = false;
			reap(restore);
			break;
		}
		default:
			break;
		}
		if (!ok)
			restore_failed(restore, ENOMEM, 3);
	}
}

/* ---- pushing the working set, or everything ---- */

static bool drains(const struct space *space);
static bool drain_step(struct space *space);

static bool event_waits(const struct thread *thread)
{
	struct pollfd any = { .fd = thread->epoll, .events = POLLIN };
	return poll(&any, 1, 0) > 0;
}

/* Push pieces until none is left, or an event has to be read first, or this thread's piece has to be read from disk. */
static void *push_part(void *argument)
{
	struct push *push = argument;
	struct restore *restore = push->restore;
	push->blocked = false;
	if (push->reading) {
		if (push->reading->error) /* whether it can be had at all, a fault will tell */
			push->at = UINT32_MAX;
		reading_put(push->reading);
		push->reading = NULL;
	}
	while (!__atomic_load_n(&restore->pause, __ATOMIC_RELAXED)) {
		if (push->at == UINT32_MAX)
			push->at = __atomic_fetch_add(&restore->next_piece, 1, __ATOMIC_RELAXED);
		if (push->at >= restore->count) {
			push->over = true;
			break;
		}
		struct piece *piece = &restore->pieces[push->at];
		struct space *space = piece->space;
		struct copier *copier = push->copier;
		enum outcome outcome = DONE;
		if (space->fd >= 0 && !__atomic_load_n(&space->gone, __ATOMIC_RELAXED))
			outcome = fill(space, piece->vaddr, piece->vaddr + piece->pages * PAGE, &push->copied, copier);
		if (outcome == AGAIN) {
			push->blocked = true;
			break;
		}
		if (outcome == COLD) {
			struct span span = { copier->file, copier->offset, copier->length };
			push->reading = reading_start(restore, span, restore->thread, true);
			if (push->reading)
				break;
		}
		if (outcome == GONE)
			__atomic_store_n(&space->gone, true, __ATOMIC_RELAXED);
		else if (outcome == FULL)
			__atomic_store_n(&restore->next_piece, restore->count, __ATOMIC_RELAXED);
		push->at = UINT32_MAX;
		if (!push->helps && event_waits(restore->thread))
			__atomic_store_n(&restore->pause, true, __ATOMIC_RELAXED);
	}
	return NULL;
}

/* Whether there is enough left for so many threads. */
static bool push_pays(const struct restore *restore, uint32_t threads)
{
	uint32_t next = __atomic_load_n(&restore->next_piece, __ATOMIC_RELAXED);
	uint32_t left = next < restore->count ? restore->count - next : 0;
	return left > (threads <= FEW_PUSHERS ? 4 * (threads - 1) : (threads - FEW_PUSHERS) * PIECES_A_PUSHER);
}

static bool push_can(const struct push *push) { return !push->over && reading_done(push->reading); }

/* Push on, by several threads, until an event comes; none is read meanwhile. This thread looks for them. */
static void push_step(struct restore *restore)
{
	struct push *own = NULL;
	pthread_t helpers[MAX_PUSHERS];
	restore->pause = false;
	for (int i = 0; i < pusher_count; i++) {
		struct push *part = &restore->parts[i];
		part->helps = false;
		if (!push_can(part))
			continue;
		if (!own) {
			own = part;
		} else if (part->at != UINT32_MAX || push_pays(restore, (uint32_t)i + 1)) {
			part->helps = true;
			if (pthread_create(&helpers[i], NULL, push_part, part))
				part->helps = false;
		}
	}
	if (own)
		push_part(own);
	__atomic_store_n(&restore->pause, true, __ATOMIC_RELAXED);
	for (int i = 0; i < pusher_count; i++)
		if (restore->parts[i].helps)
			pthread_join(helpers[i], NULL);
	for (struct space *space = restore->spaces; space; space = space->next)
		if (space->gone)
			space_over(space);
	restore->pushed = 0;
	bool over = true;
	for (int i = 0; i < pusher_count; i++) {
		struct push *part = &restore->parts[i];
		over &= part->over || (part->at == UINT32_MAX && restore->next_piece >= restore->count);
		restore->pushed += part->copied;
	}
	if (!over)
		return;
	restore->pushing = false;
	say(MSG_READY, restore->id, restore->pushed, micros(&restore->began), 0, -1);
	if (restore->everything) {
		restore->drain_ms = 0; /* where there is something left, a page that was moved, say */
		restore->sources_made = true;
		for (struct space *space = restore->spaces; space; space = space->next)
			if (drains(space))
				drain_step(space);
	}
}

static void push_begin(struct restore *restore)
{
	restore->parked = false;
	restore->pushing = true;
	restore->next_piece = 0;
	clock_gettime(CLOCK_MONOTONIC, &restore->began);
	for (int i = 0; i < pusher_count; i++)
		restore->parts[i] = (struct push){
			.restore = restore, .at = UINT32_MAX, .copier = &restore->thread->copiers[i],
		};
}

/* Memory is laid out, and the processes are about to run. */
static void restore_begin(struct restore *restore)
{
	restore->finished = true;
	uint64_t spaces = 0;
	for (struct space *space = restore->spaces; space; space = space->next)
		spaces++;
	say(MSG_HELD, restore->id, spaces, 0, 0, -1);
	if (!restore->parked)
		push_begin(restore);
}

static void record(struct restore *restore)
{
	int fd = memfd_create("woodfrog-set", MFD_CLOEXEC);
	if (fd < 0) {
		restore_failed(restore, errno, 4);
		return;
	}
	FILE *out = fdopen(dup(fd), "wb");
	struct set_head head = { SET_MAGIC, 0, 0 };
	if (out) {
		fwrite(&head, sizeof head, 1, out);
		for (struct space *space = restore->spaces; space; space = space->next) {
			if (space->forked)
				continue;
			/* Where the pages were at first, for that is where the next restore has them. */
			for (size_t i = 0; i < space->origins; i++) {
				const struct extent *e = &space->origin[i];
				uint64_t pages = (e->end - e->start) / PAGE;
				for (uint64_t p = 0; p < pages;) {
					uint64_t from = p;
					while (p < pages && bit_get(space->wanted, e->bit + p))
						p++;
					if (p > from) {
						struct set_range range = { space->pid, (uint32_t)(p - from), e->start + from * PAGE };
						fwrite(&range, sizeof range, 1, out);
						head.ranges++;
					} else
						p++;
				}
			}
		}
		rewind(out);
		fwrite(&head, sizeof head, 1, out);
		fclose(out);
	}
	say(MSG_WORKING_SET, restore->id, head.ranges, 0, 0, fd);
	close(fd);
}

/* ---- filling in the rest ---- */

static int source_order(const void *left, const void *right)
{
	const struct source *a = left, *b = right;
	return span_order(&a->span, &b->span);
}

/* All memory as it was at first, in the order of the files: so the disk reads on and on. */
static void sources_make(struct restore *restore)
{
	restore->sources_made = true;
	size_t count = 0;
	for (struct space *space = restore->spaces; space; space = space->next)
		for (size_t i = 0; !space->forked && i < space->origins; i++)
			count += (space->origin[i].end - space->origin[i].start - 1) / READ_LENGTH + 1;
	struct source *sources = malloc(count * sizeof *sources + 1);
	if (!sources)
		return; /* in the order of addresses, then */
	restore->sources = sources;
	for (struct space *space = restore->spaces; space; space = space->next)
		for (size_t i = 0; !space->forked && i < space->origins; i++) {
			const struct extent *e = &space->origin[i];
			for (uint64_t at = e->start; at < e->end; at += READ_LENGTH)
				sources[restore->source_count++] = (struct source){
					.span = { e->file, e->offset + (at - e->start), e->end - at < READ_LENGTH ? e->end - at : READ_LENGTH },
					.space = space, .vaddr = at, .bit = e->bit + (at - e->start) / PAGE,
				};
		}
	if (count)
		qsort(sources, count, sizeof *sources, source_order);
}

static bool all_installed(const struct source *source)
{
	for (uint64_t page = 0; page < source->span.length / PAGE; page++)
		if (!bit_get(source->space->installed, source->bit + page))
			return false;
	return true;
}

/* Have what the drain takes next read from disk before it comes to it. */
static void sources_ahead(struct restore *restore)
{
	struct span spans[64];
	size_t count = 0;
	uint64_t length = 0;
	if (restore->source_ahead < restore->source_at)
		restore->source_ahead = restore->source_at;
	for (size_t i = restore->source_at; i < restore->source_ahead; i++)
		length += restore->sources[i].span.length;
	if (length > DRAIN_AHEAD / 2)
		return;
	while (restore->source_ahead < restore->source_count && length < DRAIN_AHEAD && count < 64) {
		const struct source *source = &restore->sources[restore->source_ahead++];
		if (source->space->over || all_installed(source))
			continue;
		length += source->span.length;
		spans[count++] = source->span;
	}
	read_ahead(restore, spans, count);
}

/* Nobody asked for it; whether it can be had at all, a fault will tell. Unless all of it is wanted. */
static void drain_stop(struct space *space, int error, bool no_memory)
{
	space->no_drain = true;
	if (space->restore->everything)
		restore_failed_of(space->restore, error, 13, no_memory);
}

/* One step; false when there was nothing to do. */
static bool drain_sources(struct restore *restore)
{
	struct copier *copier = &restore->thread->copiers[0];
	uint64_t copied = 0;
	while (restore->source_at < restore->source_count) {
		struct source *source = &restore->sources[restore->source_at];
		struct space *space = source->space;
		if (space->over || space->no_drain || !source->span.length) {
			restore->source_at++;
			continue;
		}
		uint64_t pages = source->span.length / PAGE, skip = 0;
		while (skip < pages && bit_get(space->installed, source->bit + skip))
			skip++;
		pages = pages - skip < DRAIN_CHUNK ? pages - skip : DRAIN_CHUNK;
		enum outcome outcome = DONE;
		if (pages) {
			sources_ahead(restore);
			uint64_t at = source->vaddr + skip * PAGE;
			outcome = fill(space, at, at + pages * PAGE, &copied, copier);
		}
		switch (outcome) {
		case AGAIN:
			return true;
		case COLD: {
			struct span span = { copier->file, copier->offset, copier->length };
			restore->drain_reading = reading_start(restore, span, restore->thread, restore->everything);
			return true;
		}
		case GONE:
			space_over(space);
			return true;
		case FULL:
			drain_stop(space, ENOMEM, true);
			return true;
		case BROKEN:
			drain_stop(space, copier->error, false);
			return true;
		case DONE:
			break;
		}
		source->span.offset += (skip + pages) * PAGE;
		source->span.length -= (skip + pages) * PAGE;
		source->vaddr += (skip + pages) * PAGE;
		source->bit += skip + pages;
		if (pages)
			return true;
	}
	return false;
}

/* What is left: memory that was moved, and that of children. In the order of addresses. */
static bool drain_step(struct space *space)
{
	struct copier *copier = &space->restore->thread->copiers[0];
	uint64_t copied = 0;
	for (size_t i = extent_after(space, space->drain_from); i < space->count; i++) {
		struct extent e = space->extents[i];
		uint64_t at = e.start > space->drain_from ? e.start : space->drain_from;
		while (at < e.end && bit_get(space->installed, e.bit + (at - e.start) / PAGE))
			at += PAGE;
		space->drain_from = at;
		if (at == e.end)
			continue;
		uint64_t stop = e.end - at > DRAIN_CHUNK * PAGE ? at + DRAIN_CHUNK * PAGE : e.end;
		switch (fill(space, at, stop, &copied, copier)) {
		case GONE:
			space_over(space);
			break;
		case FULL:
			drain_stop(space, ENOMEM, true);
			break;
		case BROKEN:
			drain_stop(space, copier->error, false);
			break;
		case COLD: {
			struct span span = { copier->file, copier->offset, copier->length };
			struct restore *restore = space->restore;
			restore->drain_reading = reading_start(restore, span, restore->thread, restore->everything);
			break;
		}
		default:
			break;
		}
		return true;
	}
	if (space->pendings)
		return false;
	space_over(space);
	return true;
}

static bool drains(const struct space *space) { return !space->over && !space->no_drain; }

static bool draining(const struct restore *restore)
{
	return restore->finished && !restore->parked && !restore->pushing && !restore->failed &&
	       restore->drain_ms != UINT32_MAX && reading_done(restore->drain_reading) &&
	       micros(&restore->began) >= (uint64_t)restore->drain_ms * 1000;
}

static bool drain_one(struct restore *restore)
{
	if (restore->drain_reading) {
		int error = restore->drain_reading->error;
		reading_put(restore->drain_reading);
		restore->drain_reading = NULL;
		if (error) {
			for (struct space *s = restore->spaces; s; s = s->next)
				drain_stop(s, error, false);
			return true;
		}
	}
	if (!restore->sources_made)
		sources_make(restore);
	if (drain_sources(restore))
		return true;
	for (struct space *s = restore->spaces; s; s = s->next)
		if (drains(s) && drain_step(s))
			return true;
	return false;
}

/* One step for one restore of this thread, in turn: however many there are, the other programs have the processor. */
static void drain(struct thread *thread)
{
	uint32_t n = 0, turn = thread->turn++;
	for (struct restore *r = thread->restores; r; r = r->next)
		n += draining(r);
	for (uint32_t k = 0; k < n; k++) {
		uint32_t skip = (turn + k) % n;
		struct restore *r = thread->restores;
		while (!draining(r) || skip--)
			r = r->next;
		if (drain_one(r))
			return;
	}
}

/* ---- CRIU's side ---- */

static void connection_over(struct restore *restore)
{
	if (restore->connection >= 0)
		close(restore->connection);
	restore->connection = -1;
}

static void take_task(struct restore *restore, int32_t pid, int fd)
{
	for (struct space **at = &restore->prepared; *at; at = &(*at)->next) {
		struct space *space = *at;
		if (space->pid != pid)
			continue;
		*at = space->next;
		space->fd = fd;
		space_begin(space);
		return;
	}
	/* A task without lazy pages of its own: zeroes are right, and none are ever asked for. */
	struct space *space = calloc(1, sizeof *space);
	if (space)
		space->installed = calloc(1, 16);
	if (!space || !space->installed) {
		free(space);
		close(fd);
		restore_failed(restore, ENOMEM, 7);
		return;
	}
	space->restore = restore;
	space->fd = fd;
	space->pid = pid;
	space->number = restore->numbers++;
	space_begin(space);
}

static void connection_ready(struct restore *restore)
{
	for (int i = 0; i < EVENTS_A_TURN && !restore->failed && restore->connection >= 0; i++) {
		char byte;
		bool wait_fd = restore->expect_pid != 0;
		struct iovec part = { wait_fd ? &byte : restore->word.bytes + restore->word_has, wait_fd ? 1 : 4 - restore->word_has };
		union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
		struct msghdr head = { .msg_iov = &part, .msg_iovlen = 1 };
		if (wait_fd) {
			head.msg_control = control.space;
			head.msg_controllen = CMSG_LEN(sizeof(int)); /* one descriptor, no more */
		}
		ssize_t got = recvmsg(restore->connection, &head, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return;
		if (got <= 0) {
			connection_over(restore);
			return;
		}
		if (wait_fd) {
			struct cmsghdr *c_head = CMSG_FIRSTHDR(&head);
			if (!c_head || c_head->cmsg_type != SCM_RIGHTS || c_head->cmsg_len != CMSG_LEN(sizeof(int))) {
				restore_failed(restore, head.msg_flags & MSG_CTRUNC ? EMFILE : EPROTO, 8);
				return;
			}
			int fd;
			memcpy(&fd, CMSG_DATA(c_head), sizeof fd);
			take_task(restore, restore->expect_pid, fd);
			restore->expect_pid = 0;
			continue;
		}
		restore->word_has += (uint32_t)got;
		if (restore->word_has < 4)
			continue; /* the rest is on its way */
		restore->word_has = 0;
		uint32_t word = restore->word.whole;
		if (word == RESTORE_FINISHED) {
			if (!restore->finished)
				restore_begin(restore);
		} else if ((int32_t)word > 0)
			restore->expect_pid = (int32_t)word;
		/* A negative pid is a zombie: no descriptor follows. */
	}
}

/* ---- taking a restore in; on the main thread, from files that are checked as if an enemy had made them ---- */

static void restore_free(struct restore *restore)
{
	readings_forget(restore);
	for (int i = 0; i < MAX_PUSHERS; i++)
		reading_put(restore->parts[i].reading);
	reading_put(restore->drain_reading);
	while (restore->spaces) {
		struct space *next = restore->spaces->next;
		space_free(restore->spaces);
		restore->spaces = next;
	}
	while (restore->prepared) {
		struct space *next = restore->prepared->next;
		space_free(restore->prepared);
		restore->prepared = next;
	}
	for (uint32_t i = 0; i < restore->opened; i++)
		file_close(restore->files[i]);
	if (restore->listener >= 0) {
		epoll_ctl(restore->thread->epoll, EPOLL_CTL_DEL, restore->listener, NULL);
		close(restore->listener);
	}
	if (restore->connection >= 0)
		close(restore->connection);
	free(restore->files);
	free(restore->pieces);
	free(restore->spans);
	free(restore->wipes);
	free(restore->sources);
	free(restore);
}

static bool read_all(int fd, void *into, size_t length, off_t at)
{
	for (size_t done = 0; done < length;) {
		ssize_t got = pread(fd, (char *)into + done, length - done, at + (off_t)done);
		if (got <= 0)
			return false;
		done += (size_t)got;
	}
	return true;
}

/* One task's extents: in order, apart, and within the files. */
static bool load_extents(struct restore *restore, struct space *space, int fd, uint32_t count, off_t at)
{
	struct index_extent *raw = malloc(count * sizeof *raw + 1);
	struct extent *extents = malloc(count * sizeof *extents + 1);
	bool ok = raw && extents && read_all(fd, raw, count * sizeof *raw, at);
	for (uint32_t i = 0; ok && i < count; i++) {
		const struct index_extent *r = &raw[i];
		struct file *file = r->file < restore->opened ? restore->files[r->file] : NULL;
		uint64_t length = r->pages * PAGE;
		ok = file && !r->reserved && r->pages && r->pages < 1ULL << 40 && !(r->vaddr & (PAGE - 1)) &&
		     r->vaddr < 1ULL << 57 && !(r->offset & (PAGE - 1)) && r->offset <= file->length &&
		     length <= file->length - r->offset && (!space->count || r->vaddr >= extents[space->count - 1].end);
		if (!ok)
			break;
		struct extent *last = space->count ? &extents[space->count - 1] : NULL;
		if (last && last->end == r->vaddr && last->file == file && last->offset + (last->end - last->start) == r->offset)
			last->end += length;
		else
			extents[space->count++] = (struct extent){ r->vaddr, r->vaddr + length, r->offset, space->bits, file };
		space->bits += r->pages;
	}
	free(raw);
	space->extents = extents;
	space->room = count;
	return ok;
}

static void *grown(void *array, uint32_t count, uint32_t *room, size_t size)
{
	if (count < *room)
		return array;
	if (*room >= MAX_PIECES)
		return NULL;
	*room = *room ? *room * 2 : 256;
	return realloc(array, *room * size);
}

/* The ranges that lie in a file from `at` to its end, or NULL. */
static struct set_range *read_set(int fd, off_t at, off_t end, uint32_t *count)
{
	struct set_head head;
	if (!read_all(fd, &head, sizeof head, at) || head.magic != SET_MAGIC ||
	    end != at + (off_t)(sizeof head + head.ranges * sizeof(struct set_range)))
		return NULL;
	struct set_range *ranges = malloc(head.ranges * sizeof *ranges + 1);
	bool ok = ranges && read_all(fd, ranges, head.ranges * sizeof *ranges, at + (off_t)sizeof head);
	for (uint32_t i = 0; ok && i < head.ranges; i++)
		ok = !(ranges[i].vaddr & (PAGE - 1)) && ranges[i].vaddr < 1ULL << 57;
	if (!ok) {
		free(ranges);
		return NULL;
	}
	*count = head.ranges;
	return ranges;
}

static struct space *space_of(struct restore *restore, int32_t pid)
{
	struct space *space = restore->prepared;
	while (space && space->pid != pid)
		space = space->next;
	return space;
}

/* What may follow the files in an index. */
static bool load_wipes(struct restore *restore, int fd, off_t at, off_t end)
{
	uint32_t count = 0, room = 0;
	if (at == end)
		return true;
	struct set_range *ranges = at < end ? read_set(fd, at, end, &count) : NULL;
	bool ok = ranges;
	for (uint32_t i = 0; ok && i < count; i++) {
		uint64_t from = ranges[i].vaddr, to = from + ranges[i].pages * PAGE;
		struct space *space = space_of(restore, ranges[i].pid);
		for (size_t k = space ? extent_after(space, from) : 0;
		     ok && space && k < space->count && space->extents[k].start < to; k++) {
			const struct extent *e = &space->extents[k];
			uint64_t low = e->start > from ? e->start : from, high = e->end < to ? e->end : to;
			struct wipe *wipes = grown(restore->wipes, restore->wipe_count, &room, sizeof *wipes);
			if (!(ok = wipes))
				break;
			restore->wipes = wipes;
			wipes[restore->wipe_count++] =
				(struct wipe){ space->pid, e->bit + (low - e->start) / PAGE, (high - low) / PAGE };
		}
	}
	free(ranges);
	return ok;
}

/* `places`: a file with the place of each of the index's files in the map; -1 = they are all whole. */
static bool load_index(struct restore *restore, int fd, int places, const int *page_fds, uint32_t page_files)
{
	struct stat info;
	struct index_head head;
	if (fstat(fd, &info) || !read_all(fd, &head, sizeof head, 0) || head.magic != INDEX_MAGIC ||
	    head.files != page_files || !head.tasks || head.tasks > MAX_TASKS ||
	    !(restore->files = calloc(head.files + 1, sizeof *restore->files)))
		return false;
	for (uint32_t i = 0; i < head.files; i++) {
		uint64_t place = HERE;
		if (places >= 0 && !read_all(places, &place, sizeof place, (off_t)(i * sizeof place)))
			return false;
		if (!(restore->files[i] = file_open(page_fds[i], place)))
			return false;
		restore->opened++;
	}
	off_t at = sizeof head, extents_at = at + (off_t)(head.tasks * sizeof(struct index_task));
	for (uint32_t t = 0; t < head.tasks; t++) {
		struct index_task task;
		if (!read_all(fd, &task, sizeof task, at + (off_t)(t * sizeof task)) || task.pid <= 0 ||
		    (off_t)task.extents > (info.st_size - extents_at) / (off_t)sizeof(struct index_extent))
			return false;
		struct space *space = calloc(1, sizeof *space);
		if (!space)
			return false;
		space->fd = -1;
		space->restore = restore;
		space->pid = task.pid;
		space->number = restore->numbers++;
		space->next = restore->prepared;
		restore->prepared = space;
		if (!load_extents(restore, space, fd, task.extents, extents_at))
			return false;
		extents_at += (off_t)(task.extents * sizeof(struct index_extent));
		struct extent *origin = malloc(space->count * sizeof *origin + 1);
		space->origin = origin;
		space->origins = space->count;
		space->installed = calloc(space->bits / 64 + 2, 8);
		space->wanted = calloc(space->bits / 64 + 2, 8);
		if (!origin || !space->installed || !space->wanted)
			return false;
		memcpy(origin, space->extents, space->count * sizeof *origin);
	}
	return load_wipes(restore, fd, extents_at + (off_t)(head.files * INDEX_NAME), info.st_size);
}

struct rooms { uint32_t pieces, spans; };

/* A part of one extent that is to be pushed: to what lies before it in the process, if it fits. */
static bool add_piece(struct restore *restore, struct rooms *rooms, struct space *space, const struct extent *e,
		      uint64_t start, uint64_t end)
{
	struct span *spans = grown(restore->spans, restore->span_count, &rooms->spans, sizeof *spans);
	if (!spans)
		return false;
	restore->spans = spans;
	spans[restore->span_count++] = (struct span){ e->file, e->offset + (start - e->start), end - start };
	while (start < end) {
		struct piece *last = restore->count ? &restore->pieces[restore->count - 1] : NULL;
		uint64_t pages = (end - start) / PAGE;
		if (last && last->space == space && last->vaddr + last->pages * PAGE == start && last->pages < PUSH_CHUNK) {
			pages = pages < PUSH_CHUNK - last->pages ? pages : PUSH_CHUNK - last->pages;
			last->pages += (uint32_t)pages;
		} else {
			struct piece *pieces = grown(restore->pieces, restore->count, &rooms->pieces, sizeof *pieces);
			if (!pieces)
				return false;
			restore->pieces = pieces;
			pages = pages < PUSH_CHUNK ? pages : PUSH_CHUNK;
			pieces[restore->count++] = (struct piece){ space, start, (uint32_t)pages };
		}
		start += pages * PAGE;
	}
	return true;
}

/* What of a working set this index has. */
static bool load_set(struct restore *restore, int fd)
{
	struct stat info;
	uint32_t count = 0;
	struct set_range *ranges = fstat(fd, &info) ? NULL : read_set(fd, 0, info.st_size, &count);
	bool ok = ranges;
	struct rooms rooms = { 0 };
	for (uint32_t i = 0; ok && i < count; i++) {
		uint64_t start = ranges[i].vaddr, end = start + ranges[i].pages * PAGE;
		struct space *space = space_of(restore, ranges[i].pid);
		for (size_t k = space ? extent_after(space, start) : 0;
		     ok && space && k < space->count && space->extents[k].start < end; k++) {
			const struct extent *e = &space->extents[k];
			ok = add_piece(restore, &rooms, space, e, e->start > start ? e->start : start, e->end < end ? e->end : end);
		}
	}
	free(ranges);
	return ok;
}

static bool load_everything(struct restore *restore)
{
	bool ok = true;
	struct rooms rooms = { 0 };
	for (struct space *space = restore->prepared; space; space = space->next)
		for (size_t k = 0; ok && k < space->count; k++)
			ok = add_piece(restore, &rooms, space, &space->extents[k], space->extents[k].start, space->extents[k].end);
	return ok;
}

static struct restore *restore_new(const struct command *command, const int *fds, uint32_t count)
{
	bool mapped = command->flags & WITH_MAP;
	uint32_t set = command->flags & WITH_SET, first = 2 + set + 2 * mapped;
	uint64_t around = command->around;
	if (count < first || around < PAGE || around > 1 << 24 || (around & (around - 1)))
		return NULL;
	struct restore *restore = calloc(1, sizeof *restore);
	if (!restore)
		return NULL;
	restore->id = command->id;
	restore->around = command->around;
	restore->drain_ms = command->drain_ms;
	restore->parked = command->flags & PARKED;
	restore->everything = command->flags & EVERYTHING;
	restore->connection = -1;
	restore->listener = fds[0];
	if ((mapped && !map_open(fds[2 + set])) ||
	    !load_index(restore, fds[1], mapped ? fds[3 + set] : -1, fds + first, count - first)) {
		restore->listener = -1; /* the caller closes what it was given */
		restore_free(restore);
		return NULL;
	}
	/* A working set only makes things fast: one that cannot be used is left out, and READY tells of no pages. */
	bool pushed = restore->everything ? load_everything(restore) : set && load_set(restore, fds[2]);
	if (!pushed)
		restore->count = restore->span_count = 0;
	if (restore->span_count)
		qsort(restore->spans, restore->span_count, sizeof *restore->spans, span_order);
	return restore;
}

/* ---- threads ---- */

static void carry_out(struct thread *thread, struct job *job)
{
	struct restore **at = &thread->restores;
	if (job->command.op == CMD_RESTORE) {
		struct restore *restore = job->restore;
		restore->next = thread->restores;
		thread->restores = restore;
		if (!watch(thread, restore->listener, restore, KIND_LISTENER))
			restore_failed(restore, errno, 9);
		else
			read_ahead(restore, restore->spans, restore->span_count); /* while CRIU is still busy */
		return;
	}
	while (*at && (*at)->id != job->command.id)
		at = &(*at)->next;
	struct restore *restore = *at;
	if (!restore)
		return;
	switch (job->command.op) {
	case CMD_WORKING_SET:
		record(restore);
		break;
	case CMD_DRAIN:
		restore->drain_ms = job->command.drain_ms;
		break;
	case CMD_PUSH:
		if (!restore->parked || restore->failed)
			break;
		restore->parked = false;
		read_ahead(restore, restore->spans, restore->span_count);
		if (restore->finished)
			push_begin(restore);
		break;
	case CMD_DROP:
		*at = restore->next;
		say(MSG_STATS, restore->id, restore->pushed, restore->faults, restore->demanded, -1);
		restore_free(restore);
		__atomic_fetch_sub(&thread->load, 1, __ATOMIC_RELAXED);
		break;
	}
}

static void run_jobs(struct thread *thread)
{
	uint64_t count;
	if (read(thread->wake, &count, sizeof count) < 0 && errno != EAGAIN)
		return;
	for (;;) {
		pthread_mutex_lock(&thread->lock);
		struct job *job = thread->jobs;
		if (job)
			thread->jobs = job->next;
		pthread_mutex_unlock(&thread->lock);
		if (!job)
			return;
		carry_out(thread, job);
		free(job);
	}
}

/* Milliseconds until there is something to do that no event tells of; -1 = for ever. */
static int patience(const struct thread *thread)
{
	int wait = -1;
	for (struct restore *r = thread->restores; r; r = r->next) {
		if (r->failed)
			continue;
		int until = -1;
		for (int i = 0; r->pushing && i < pusher_count; i++)
			if (push_can(&r->parts[i]) && until)
				until = r->parts[i].blocked ? RETRY_MS : 0;
		bool left = false;
		for (struct space *s = r->spaces; s; s = s->next) {
			left |= drains(s);
			for (size_t i = 0; i < s->pendings && until < 0; i++)
				if (reading_done(s->pending[i].reading))
					until = RETRY_MS;
		}
		if (until < 0 && left && r->finished && !r->pushing && !r->parked && r->drain_ms != UINT32_MAX &&
		    reading_done(r->drain_reading)) {
			uint64_t past = micros(&r->began) / 1000;
			until = past >= r->drain_ms ? RETRY_MS : (int)(r->drain_ms - past) + 1;
		}
		if (until >= 0 && (wait < 0 || until < wait))
			wait = until;
	}
	return wait;
}

static void listener_ready(struct thread *thread, struct restore *restore)
{
	int fd = accept4(restore->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0) {
		if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
			restore_failed(restore, errno, 10);
		return;
	}
	/* One CRIU, once. */
	epoll_ctl(thread->epoll, EPOLL_CTL_DEL, restore->listener, NULL);
	close(restore->listener);
	restore->listener = -1;
	restore->connection = fd;
	if (!watch(thread, fd, restore, KIND_CONNECTION))
		restore_failed(restore, errno, 10);
}

static void *serve(void *argument)
{
	struct thread *thread = argument;
	for (;;) {
		struct epoll_event events[64];
		int count = epoll_wait(thread->epoll, events, 64, patience(thread));
		bool jobs = false;
		for (int i = 0; i < count; i++) {
			void *what = (void *)(uintptr_t)(events[i].data.u64 & ~3ULL);
			switch (events[i].data.u64 & 3) {
			case KIND_WAKE:
				jobs = true;
				break;
			case KIND_LISTENER:
				if (((struct restore *)what)->listener >= 0)
					listener_ready(thread, what);
				break;
			case KIND_CONNECTION:
				connection_ready(what);
				break;
			default:
				if (!((struct space *)what)->over)
					space_events(what);
			}
		}
		/* Last: these free what an event of this round may have pointed to. */
		while (thread->dead) {
			struct space *next = thread->dead->next;
			space_free(thread->dead);
			thread->dead = next;
		}
		if (jobs)
			run_jobs(thread);
		for (struct restore *r = thread->restores; r; r = r->next) {
			for (struct space *s = r->spaces; s && !r->failed; s = s->next)
				if (s->pendings)
					space_retry(s);
			if (r->pushing && !r->failed)
				push_step(r);
		}
		if (count <= 0)
			drain(thread);
	}
	return NULL;
}

static void post(struct thread *thread, const struct command *command, struct restore *restore)
{
	struct job *job = calloc(1, sizeof *job);
	if (!job) {
		say(MSG_FAILED, command->id, ENOMEM, 11, 0, -1);
		if (restore)
			restore_free(restore);
		return;
	}
	job->command = *command;
	job->restore = restore;
	pthread_mutex_lock(&thread->lock);
	struct job **at = &thread->jobs;
	while (*at)
		at = &(*at)->next;
	*at = job;
	pthread_mutex_unlock(&thread->lock);
	wake(thread);
}

static void control(void)
{
	struct command command;
	struct iovec part = { &command, sizeof command };
	union { char space[CMSG_SPACE(MAX_FDS * sizeof(int))]; struct cmsghdr align; } space;
	for (;;) {
		struct msghdr head = {
			.msg_iov = &part, .msg_iovlen = 1, .msg_control = space.space, .msg_controllen = sizeof space.space,
		};
		ssize_t got = recvmsg(control_fd, &head, MSG_CMSG_CLOEXEC);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return; /* the daemon is gone */
		int fds[MAX_FDS];
		uint32_t count = 0;
		struct cmsghdr *c_head = CMSG_FIRSTHDR(&head);
		if (c_head && c_head->cmsg_type == SCM_RIGHTS) {
			count = (uint32_t)((c_head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
			memcpy(fds, CMSG_DATA(c_head), count * sizeof(int));
		}
		bool whole = got == (ssize_t)sizeof command && !(head.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
		uint32_t keep = 0;
		if (whole && command.op == CMD_RESTORE) {
			struct restore *restore = command.fds == count && count ? restore_new(&command, fds, count) : NULL;
			if (restore) {
				struct thread *thread = &threads[0];
				for (int i = 1; i < thread_count; i++)
					if (__atomic_load_n(&threads[i].load, __ATOMIC_RELAXED) <
					    __atomic_load_n(&thread->load, __ATOMIC_RELAXED))
						thread = &threads[i];
				__atomic_fetch_add(&thread->load, 1, __ATOMIC_RELAXED);
				restore->thread = thread;
				keep = 1; /* the listening socket is the restore's now */
				post(thread, &command, restore);
			} else
				say(MSG_FAILED, command.id, EINVAL, 12, 0, -1);
		} else if (whole && command.op == CMD_HAVE) {
			readings_have(command.around, command.drain_ms, (int)command.flags);
		} else if (whole) {
			for (int i = 0; i < thread_count; i++)
				post(&threads[i], &command, NULL);
		} else if (got >= (ssize_t)offsetof(struct command, fds))
			say(MSG_FAILED, command.id, EMFILE, 12, 0, -1); /* not all of its descriptors could be taken */
		for (uint32_t i = keep; i < count; i++)
			close(fds[i]);
	}
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: woodfrog-pageserver UID FD (started by woodfrogd)\n");
		return 2;
	}
	unsigned uid = (unsigned)strtoul(argv[1], NULL, 10);
	/*
	 * A faulting process waits for this one. Behind busy threads (OpenMP's spin) it would wait milliseconds for each
	 * page; what is done here takes microseconds.
	 */
	struct sched_param priority = { .sched_priority = 1 };
	if (sched_setscheduler(0, SCHED_RR, &priority))
		setpriority(PRIO_PROCESS, 0, -20);
	control_fd = atoi(argv[2]);
	fcntl(control_fd, F_SETFD, FD_CLOEXEC);
	signal(SIGPIPE, SIG_IGN);
	/* An init system that stops a whole group would have this one die first. It ends with its daemon, not before. */
	signal(SIGTERM, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	struct rlimit open_files;
	if (!getrlimit(RLIMIT_NOFILE, &open_files)) {
		open_files.rlim_cur = open_files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &open_files);
	}
	if (uid && (setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))) {
		perror("woodfrog-pageserver: cannot drop privileges");
		return 1;
	}
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	long processors = PROCESSORS;
	thread_count = processors < 2 ? 2 : processors > MAX_THREADS ? MAX_THREADS : (int)processors;
	pusher_count = thread_count < FEW_PUSHERS ? thread_count : FEW_PUSHERS;
	/* Not all processors: at this priority nothing would be left for the processes, nor for a GPU's driver. */
	if (processors / 2 > pusher_count)
		pusher_count = processors / 2 < MAX_PUSHERS ? (int)(processors / 2) : MAX_PUSHERS;
	for (int i = 0; i < thread_count; i++) {
		struct thread *thread = &threads[i];
		pthread_mutex_init(&thread->lock, NULL);
		bool staged = true;
		for (int k = 0; k < pusher_count; k++)
			staged &= (thread->copiers[k].stage = aligned_alloc(PAGE, BATCH * PAGE)) != NULL;
		thread->epoll = epoll_create1(EPOLL_CLOEXEC);
		thread->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = KIND_WAKE };
		if (!staged || thread->epoll < 0 || thread->wake < 0 || epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wake, &event) ||
		    pthread_create(&thread->handle, NULL, serve, thread)) {
			perror("woodfrog-pageserver: cannot start a thread");
			return 1;
		}
	}
	if (!readers_start()) {
		perror("woodfrog-pageserver: cannot start a thread");
		return 1;
	}
	control();
	/* The sandboxes die with the daemon; until they have, their memory must not turn to zeroes. */
	sleep(3);
	return 0;
}
