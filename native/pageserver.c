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
 * copy of what was removed.) Only slices of the push, while no event is read, are shared by two threads.
 *
 * These threads go before all others of the machine: none of them may wait for a process or for a disk in a loop.
 * What cannot be done now (the kernel says EAGAIN while a process changes its memory) is kept and tried again a
 * millisecond later.
 *
 * The kernel gives a process zeroes when its last userfaultfd descriptor closes. So the daemon gets a copy of each
 * before it is used, and when this program dies the processes wait, until the daemon has killed them, instead of reading
 * zeroes. When the daemon dies, its sandboxes die with it; this program waits for that before it goes.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/userfaultfd.h>
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
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 200
#define MAX_THREADS 16
#define PAGE 4096ULL
#define INDEX_MAGIC 0x31584449474f5246ULL /* "FROGIDX1" */
#define SET_MAGIC 0x31544553474f5246ULL   /* "FROGSET1" */
#define RESTORE_FINISHED 0x52535446u
#define MAX_PIECES (1u << 20)
#define PUSH_CHUNK (512 * PAGE)
#define PUSH_SLICE 1024 /* pages a thread pushes before events are looked at again */
#define DRAIN_CHUNK (64 * PAGE)
#define ZERO_AROUND (16 * PAGE)
#define EVENTS_A_TURN 64
#define RETRY_MS 1
#define FULL_US 2000000 /* so long a full memory cgroup may take to make room, by killing, say */
#define TOP_PAGE 0x7fffffffe000ULL /* never mapped */

/* ---- what goes over the control socket; native byte order, both ends are this machine ---- */

enum { CMD_RESTORE = 1, CMD_DROP = 2, CMD_WORKING_SET = 3, CMD_DRAIN = 4 };
enum {
	MSG_HOLD = 1,        /* a userfaultfd to keep open; a = number of the address space */
	MSG_READY = 2,       /* the working set is in; a = pages, b = microseconds */
	MSG_WORKING_SET = 3, /* the recorded set, as a memfd; a = ranges */
	MSG_COMPLETE = 4,    /* an address space is whole, or gone: its descriptor may go; a = its number */
	MSG_FAILED = 5,      /* this restore cannot go on; a = errno, b = step */
	MSG_STATS = 6,       /* answer to DROP: a = pages pushed, b = demand faults, c = pages by demand */
	MSG_HELD = 7,        /* the processes are about to run, and a copy of every descriptor was sent; a = how many */
};

struct command {
	uint32_t op, id;
	uint32_t fds;        /* descriptors with it: listening socket, index, working set, then a file per task */
	uint32_t around;     /* bytes served around a fault, a power of two */
	uint32_t drain_ms;   /* fill in the rest so long after the start; 0xffffffff = never */
	uint32_t flags;      /* bit 0: there is a working set */
};

struct message {
	uint32_t op, id;
	uint64_t a, b, c;
};

/* ---- files ---- */

struct index_head { uint64_t magic; uint32_t tasks, reserved; };
struct index_task { int32_t pid; uint32_t extents; };
struct index_extent { uint64_t vaddr, pages, offset; };
struct set_head { uint64_t magic; uint32_t ranges, reserved; };
struct set_range { int32_t pid; uint32_t pages; uint64_t vaddr; };

struct file {
	dev_t dev;
	ino_t ino;
	const uint8_t *data;
	size_t length;
	int users;
	struct file *next;
};

struct extent {
	uint64_t start, end, offset; /* offset in the file, bytes */
	uint64_t bit;                /* of its first page */
};

struct space {
	struct restore *restore;
	struct file *file;
	struct space *next;
	struct extent *extents;
	size_t count, room;
	const struct extent *origin; /* the extents as they were at first, which bits are counted by */
	size_t origins;
	uint64_t *installed; /* a bit for each page of the index: it is in, or there is no place for it */
	uint64_t *wanted;    /* pages asked for by faults: the working set's record; shared with forked children */
	uint64_t bits;
	uint64_t drain_from; /* address; what lies below is filled in */
	uint64_t *pending;   /* addresses of faults to be served again */
	size_t pendings, pending_room;
	struct timespec full_since;
	int fd;
	int32_t pid;
	uint32_t number;
	bool forked, over, gone, full, no_drain;
};

/* A part of the working set, within one extent. */
struct piece {
	struct space *space;
	const uint8_t *data;
	uint64_t vaddr;
	uint32_t pages;
};

struct push {
	struct restore *restore;
	uint32_t at, step;
	uint64_t copied;
	bool blocked;
};

struct restore {
	struct restore *next;
	struct thread *thread;
	struct space *spaces;
	struct piece *pieces;
	struct file **files;
	uint32_t id, count, tasks, around, drain_ms, numbers;
	int listener, connection;
	int32_t expect_pid; /* a descriptor for this task comes next; 0 = a pid comes */
	bool finished, failed, pushing, warming, stop_warming;
	pthread_t warmer;
	struct push parts[2];
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
	uint32_t turn;
	int load;
};

static int control_fd;
static struct thread threads[MAX_THREADS];
static int thread_count;
static pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static struct file *files;
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

/* ---- the page files: mapped once for all restores from one snapshot ---- */

static struct file *file_open(int fd)
{
	struct stat info;
	if (fstat(fd, &info) || !S_ISREG(info.st_mode))
		return NULL;
	pthread_mutex_lock(&files_lock);
	struct file *file = files;
	while (file && !(file->dev == info.st_dev && file->ino == info.st_ino && file->length == (size_t)info.st_size))
		file = file->next;
	if (!file && (file = calloc(1, sizeof *file))) {
		file->dev = info.st_dev;
		file->ino = info.st_ino;
		file->length = (size_t)info.st_size;
		if (file->length) {
			void *data = mmap(NULL, file->length, PROT_READ, MAP_SHARED, fd, 0);
			if (data == MAP_FAILED) {
				free(file);
				pthread_mutex_unlock(&files_lock);
				return NULL;
			}
			file->data = data;
		}
		file->next = files;
		files = file;
	}
	if (file)
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
		if (file->data)
			munmap((void *)file->data, file->length);
		free(file);
	}
	pthread_mutex_unlock(&files_lock);
}

/* ---- address spaces ---- */

static bool bit_get(const uint64_t *bits, uint64_t n) { return bits[n / 64] >> (n % 64) & 1; }

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

static bool extent_insert(struct space *space, size_t at, struct extent value)
{
	if (space->count == space->room) {
		size_t room = space->room ? space->room * 2 : 64;
		struct extent *grown = realloc(space->extents, room * sizeof *grown);
		if (!grown)
			return false;
		space->extents = grown;
		space->room = room;
	}
	memmove(space->extents + at + 1, space->extents + at, (space->count - at) * sizeof value);
	space->extents[at] = value;
	space->count++;
	return true;
}

/* Forget what lies in [start, end): it is the process's own from now on. */
static bool extents_cut(struct space *space, uint64_t start, uint64_t end)
{
	size_t i = extent_after(space, start);
	while (i < space->count && space->extents[i].start < end) {
		struct extent *e = &space->extents[i];
		if (e->start < start && e->end > end) {
			struct extent rest = { end, e->end, e->offset + (end - e->start), e->bit + (end - e->start) / PAGE };
			e->end = start;
			return extent_insert(space, i + 1, rest);
		}
		if (e->start < start) {
			e->end = start;
			i++;
		} else if (e->end > end) {
			e->offset += end - e->start;
			e->bit += (end - e->start) / PAGE;
			e->start = end;
			i++;
		} else {
			memmove(e, e + 1, (space->count - i - 1) * sizeof *e);
			space->count--;
		}
	}
	return true;
}

static bool extents_move(struct space *space, uint64_t from, uint64_t to, uint64_t length)
{
	size_t taken = 0, room = 0;
	struct extent *moved = NULL;
	for (size_t i = extent_after(space, from); i < space->count && space->extents[i].start < from + length; i++) {
		struct extent e = space->extents[i];
		if (e.start < from) {
			e.offset += from - e.start;
			e.bit += (from - e.start) / PAGE;
			e.start = from;
		}
		if (e.end > from + length)
			e.end = from + length;
		e.start = e.start - from + to;
		e.end = e.end - from + to;
		if (taken == room) {
			room = room ? room * 2 : 16;
			struct extent *grown = realloc(moved, room * sizeof e);
			if (!grown) {
				free(moved);
				return false;
			}
			moved = grown;
		}
		moved[taken++] = e;
	}
	bool ok = extents_cut(space, from, from + length) && extents_cut(space, to, to + length);
	if (taken && moved[0].start < space->drain_from)
		space->drain_from = moved[0].start;
	for (size_t i = 0; ok && i < taken; i++)
		ok = extent_insert(space, extent_after(space, moved[i].start), moved[i]);
	free(moved);
	return ok;
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
	if (space->forked)
		file_close(space->file);
	else {
		free(space->wanted);
		free((void *)space->origin);
	}
	free(space->extents);
	free(space->installed);
	free(space->pending);
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
	free(space->pending);
	space->extents = NULL;
	space->installed = space->pending = NULL;
	space->count = space->pendings = 0;
	say(MSG_COMPLETE, space->restore->id, space->number, 0, 0, -1);
}

/* Nothing is served any more; the processes wait, their descriptors open, until the daemon has killed them. */
static void restore_failed(struct restore *restore, int error, int step)
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
	say(MSG_FAILED, restore->id, (uint64_t)error, (uint64_t)step, 0, -1);
}

enum outcome { DONE, AGAIN, FULL, GONE, BROKEN };

/* Copy [start, end) of one extent in. AGAIN: an event has to be read first. FULL: the process may not have more memory. */
static enum outcome copy_in(struct space *space, struct extent e, uint64_t start, uint64_t end, uint64_t *copied)
{
	while (start < end) {
		uint64_t offset = e.offset + (start - e.start);
		if (offset + (end - start) > space->file->length) {
			errno = ERANGE;
			return BROKEN;
		}
		struct uffdio_copy copy = {
			.dst = start, .src = (uint64_t)(uintptr_t)space->file->data + offset, .len = end - start,
		};
		int failed = ioctl(space->fd, UFFDIO_COPY, &copy) ? errno : 0;
		uint64_t done = copy.copy > 0 ? (uint64_t)copy.copy : 0;
		if (done) {
			bits_set(space->installed, e.bit + (start - e.start) / PAGE, done / PAGE);
			start += done;
			*copied += done / PAGE;
		}
		if (!failed || done)
			continue; /* after a part the kernel says EAGAIN whatever the reason is: the next try tells */
		switch (failed) {
		case EEXIST: /* the process, or an earlier copy, was first */
			bits_set(space->installed, e.bit + (start - e.start) / PAGE, 1);
			start += PAGE;
			break;
		case ENOENT: /* a seam between two maps, or a map that is not ours */
			if (end - start > PAGE) {
				uint64_t middle = start + ((end - start) / 2 & ~(PAGE - 1));
				enum outcome half = copy_in(space, e, start, middle, copied);
				if (half != DONE)
					return half;
				start = middle;
			} else if (ioctl(space->fd, UFFDIO_COPY, &copy) && errno == ENOENT) {
				/*
				 * Had the map gone by a change whose event is still to be read, EAGAIN would have come this time;
				 * so there is no such map.
				 */
				bits_set(space->installed, e.bit + (start - e.start) / PAGE, 1);
				start += PAGE;
			} /* else it is in now, or the next try tells */
			break;
		case EAGAIN:
			return AGAIN;
		case ENOMEM:
			return FULL;
		case ESRCH:
			return GONE;
		default:
			errno = failed;
			return BROKEN;
		}
	}
	return DONE;
}

/* Copy what is missing of [start, end), over all extents in it. */
static enum outcome fill(struct space *space, uint64_t start, uint64_t end, uint64_t *copied)
{
	for (size_t i = extent_after(space, start); i < space->count && space->extents[i].start < end; i++) {
		struct extent e = space->extents[i];
		uint64_t at = e.start > start ? e.start : start, stop = e.end < end ? e.end : end;
		while (at < stop) {
			while (at < stop && bit_get(space->installed, e.bit + (at - e.start) / PAGE))
				at += PAGE;
			uint64_t run = at;
			while (run < stop && !bit_get(space->installed, e.bit + (run - e.start) / PAGE))
				run += PAGE;
			if (run > at) {
				enum outcome outcome = copy_in(space, e, at, run, copied);
				if (outcome != DONE)
					return outcome;
			}
			at = run;
		}
	}
	return DONE;
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
	address &= ~(PAGE - 1);
	struct extent *found = extent_at(space, address);
	if (!found) {
		/* Zero pages up to what comes next: a heap that grows asks for one after the other. */
		size_t next = extent_after(space, address);
		uint64_t length = ZERO_AROUND - (address & (ZERO_AROUND - 1));
		if (next < space->count && space->extents[next].start - address < length)
			length = space->extents[next].start - address;
		return zero_in(space, address, length);
	}
	uint64_t page = found->bit + (address - found->start) / PAGE;
	restore->faults++;
	/* It is in by now; or the process lost it in a way that no event tells of (a child's MADV_WIPEONFORK): zeroes. */
	if (bit_get(space->installed, page))
		return zero_in(space, address, PAGE);
	struct extent e = *found;
	uint64_t around = restore->around, start = address & ~(around - 1), end = start + around;
	if (start < e.start)
		start = e.start;
	if (end > e.end)
		end = e.end;
	/* All that goes in is the working set's: what is touched next without a fault would not be seen otherwise. */
	bits_set(space->wanted, e.bit + (start - e.start) / PAGE, (end - start) / PAGE);
	/* The page itself first: its thread waits. */
	uint64_t before = restore->demanded;
	enum outcome outcome = copy_in(space, e, address, address + PAGE, &restore->demanded);
	if (outcome != DONE)
		return outcome;
	if (restore->demanded == before) {
		struct uffdio_range range = { address, PAGE };
		ioctl(space->fd, UFFDIO_WAKE, &range);
	}
	/* What lies around it was not asked for; whether that works out, a fault will tell. */
	if (around > PAGE && fill(space, start, end, &restore->demanded) == GONE)
		return GONE;
	return DONE;
}

static bool space_wait(struct space *space, uint64_t address)
{
	if (space->pendings == space->pending_room) {
		size_t room = space->pending_room ? space->pending_room * 2 : 16;
		uint64_t *grown = realloc(space->pending, room * sizeof *grown);
		if (!grown)
			return false;
		space->pending = grown;
		space->pending_room = room;
	}
	space->pending[space->pendings++] = address;
	return true;
}

/* Serve a fault, or keep it for later. */
static void space_fault(struct space *space, uint64_t address)
{
	struct restore *restore = space->restore;
	enum outcome outcome = serve_fault(space, address);
	switch (outcome) {
	case DONE:
		space->full = false;
		return;
	case FULL:
		if (!space->full)
			clock_gettime(CLOCK_MONOTONIC, &space->full_since);
		space->full = true;
		if (micros(&space->full_since) > FULL_US) {
			restore_failed(restore, ENOMEM, 1);
			return;
		}
		break;
	case AGAIN:
		break;
	case GONE:
		space_over(space);
		return;
	case BROKEN:
		restore_failed(restore, errno, 1);
		return;
	}
	if (!space_wait(space, address))
		restore_failed(restore, ENOMEM, 2);
}

static void space_retry(struct space *space)
{
	size_t count = space->pendings;
	space->pendings = 0;
	/* What is put back lies below what is still to be read. */
	for (size_t i = 0; i < count && !space->over && !space->restore->failed; i++)
		space_fault(space, space->pending[i]);
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
	if (child->file) {
		pthread_mutex_lock(&files_lock);
		child->file->users++;
		pthread_mutex_unlock(&files_lock);
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

/* ---- the working set ---- */

/* Push every `step`th piece from `at` on, one slice; stops where an event has to be read first. */
static void *push_part(void *argument)
{
	struct push *push = argument;
	struct restore *restore = push->restore;
	uint64_t until = push->copied + PUSH_SLICE;
	push->blocked = false;
	for (; push->at < restore->count && push->copied < until; push->at += push->step) {
		struct piece *piece = &restore->pieces[push->at];
		struct space *space = piece->space;
		if (space->fd < 0 || __atomic_load_n(&space->gone, __ATOMIC_RELAXED))
			continue;
		enum outcome outcome = fill(space, piece->vaddr, piece->vaddr + piece->pages * PAGE, &push->copied);
		if (outcome == AGAIN) {
			push->blocked = true;
			return NULL;
		}
		if (outcome == GONE)
			__atomic_store_n(&space->gone, true, __ATOMIC_RELAXED);
		else if (outcome != DONE) {
			push->at = restore->count; /* whether it can be had at all, a fault will tell */
			return NULL;
		}
	}
	return NULL;
}

/* A slice of the working set, by two threads; no event is read meanwhile. */
static void push_step(struct restore *restore)
{
	struct push *parts = restore->parts;
	pthread_t helper;
	bool helped = parts[0].at + 16 < restore->count && parts[1].at < restore->count &&
		      pthread_create(&helper, NULL, push_part, &parts[1]) == 0;
	push_part(&parts[0]);
	if (helped)
		pthread_join(helper, NULL);
	else
		push_part(&parts[1]);
	for (struct space *space = restore->spaces; space; space = space->next)
		if (space->gone)
			space_over(space);
	if (parts[0].at < restore->count || parts[1].at < restore->count)
		return;
	restore->pushing = false;
	restore->pushed = parts[0].copied + parts[1].copied;
	say(MSG_READY, restore->id, restore->pushed, micros(&restore->began), 0, -1);
}

static void push_begin(struct restore *restore)
{
	__atomic_store_n(&restore->stop_warming, true, __ATOMIC_RELAXED);
	restore->finished = restore->pushing = true;
	clock_gettime(CLOCK_MONOTONIC, &restore->began);
	for (uint32_t i = 0; i < 2; i++)
		restore->parts[i] = (struct push){ .restore = restore, .at = i, .step = 2 };
	uint64_t spaces = 0;
	for (struct space *space = restore->spaces; space; space = space->next)
		spaces++;
	say(MSG_HELD, restore->id, spaces, 0, 0, -1);
}

/* Have the working set's pages at hand, from disk if need be, while CRIU is still busy. */
static void *warm_up(void *argument)
{
	struct restore *restore = argument;
	for (uint32_t i = 0; i < restore->count && !__atomic_load_n(&restore->stop_warming, __ATOMIC_RELAXED); i++)
		madvise((void *)restore->pieces[i].data, restore->pieces[i].pages * PAGE, MADV_POPULATE_READ);
	return NULL;
}

/* On a thread of its own, and of no priority: it waits for the disk. */
static void warm_begin(struct restore *restore)
{
	pthread_attr_t ordinary;
	struct sched_param none = { 0 };
	if (!restore->count || pthread_attr_init(&ordinary))
		return;
	pthread_attr_setinheritsched(&ordinary, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&ordinary, SCHED_OTHER);
	pthread_attr_setschedparam(&ordinary, &none);
	restore->warming = pthread_create(&restore->warmer, &ordinary, warm_up, restore) == 0;
	pthread_attr_destroy(&ordinary);
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

/* One step; false when there was nothing to do. */
static bool drain_step(struct space *space)
{
	uint64_t copied = 0;
	for (size_t i = extent_after(space, space->drain_from); i < space->count; i++) {
		struct extent e = space->extents[i];
		uint64_t at = e.start > space->drain_from ? e.start : space->drain_from;
		while (at < e.end && bit_get(space->installed, e.bit + (at - e.start) / PAGE))
			at += PAGE;
		space->drain_from = at;
		if (at == e.end)
			continue;
		uint64_t stop = at + DRAIN_CHUNK < e.end ? at + DRAIN_CHUNK : e.end;
		switch (fill(space, at, stop, &copied)) {
		case GONE:
			space_over(space);
			break;
		case FULL:
		case BROKEN:
			/* Nobody asked for it; whether it can be had at all, a fault will tell. */
			space->no_drain = true;
			break;
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
	return restore->finished && !restore->pushing && !restore->failed && restore->drain_ms != UINT32_MAX &&
	       micros(&restore->began) >= (uint64_t)restore->drain_ms * 1000;
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
		for (struct space *s = r->spaces; s; s = s->next)
			if (drains(s) && drain_step(s))
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
		uint32_t word = 0;
		bool wait_fd = restore->expect_pid != 0;
		struct iovec part = { &word, wait_fd ? 1 : sizeof word };
		union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
		struct msghdr head = { .msg_iov = &part, .msg_iovlen = 1 };
		if (wait_fd) {
			head.msg_control = control.space;
			head.msg_controllen = CMSG_LEN(sizeof(int)); /* one descriptor, no more */
		}
		ssize_t got = recvmsg(restore->connection, &head, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | (wait_fd ? 0 : MSG_PEEK));
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
		if (got < (ssize_t)sizeof word)
			return; /* the rest is on its way; the next event tells */
		recv(restore->connection, &word, sizeof word, MSG_DONTWAIT);
		if (word == RESTORE_FINISHED) {
			if (!restore->finished)
				push_begin(restore);
		} else if ((int32_t)word > 0)
			restore->expect_pid = (int32_t)word;
		/* A negative pid is a zombie: no descriptor follows. */
	}
}

/* ---- taking a restore in; on the main thread, from files that are checked as if an enemy had made them ---- */

static void restore_free(struct restore *restore)
{
	if (restore->warming) {
		__atomic_store_n(&restore->stop_warming, true, __ATOMIC_RELAXED);
		pthread_join(restore->warmer, NULL);
	}
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
	for (uint32_t i = 0; i < restore->tasks; i++)
		file_close(restore->files[i]);
	if (restore->listener >= 0) {
		epoll_ctl(restore->thread->epoll, EPOLL_CTL_DEL, restore->listener, NULL);
		close(restore->listener);
	}
	if (restore->connection >= 0)
		close(restore->connection);
	free(restore->files);
	free(restore->pieces);
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

static bool load_index(struct restore *restore, int fd, const int *page_fds, uint32_t page_files)
{
	struct stat info;
	struct index_head head;
	if (fstat(fd, &info) || !read_all(fd, &head, sizeof head, 0) || head.magic != INDEX_MAGIC ||
	    head.tasks != page_files || !(restore->files = calloc(head.tasks + 1, sizeof *restore->files)))
		return false;
	off_t at = sizeof head, extents_at = at + (off_t)(head.tasks * sizeof(struct index_task));
	for (uint32_t t = 0; t < head.tasks; t++) {
		struct index_task task;
		if (!read_all(fd, &task, sizeof task, at + (off_t)(t * sizeof task)) || task.pid <= 0 ||
		    (off_t)task.extents > info.st_size / (off_t)sizeof(struct index_extent))
			return false;
		struct file *file = file_open(page_fds[t]);
		if (!file)
			return false;
		restore->files[restore->tasks++] = file;
		struct space *space = calloc(1, sizeof *space);
		if (!space)
			return false;
		space->fd = -1;
		space->restore = restore;
		space->file = file;
		space->pid = task.pid;
		space->number = restore->numbers++;
		space->next = restore->prepared;
		restore->prepared = space;
		struct index_extent *raw = malloc(task.extents * sizeof *raw + 1);
		space->extents = malloc(task.extents * sizeof *space->extents + 1);
		space->room = task.extents;
		bool ok = raw && space->extents && read_all(fd, raw, task.extents * sizeof *raw, extents_at);
		for (uint32_t i = 0; ok && i < task.extents; i++) {
			uint64_t length = raw[i].pages * PAGE;
			ok = raw[i].pages && raw[i].pages < 1ULL << 40 && !(raw[i].vaddr & (PAGE - 1)) &&
			     raw[i].vaddr < 1ULL << 57 && !(raw[i].offset & (PAGE - 1)) &&
			     raw[i].offset <= file->length && length <= file->length - raw[i].offset &&
			     (!i || raw[i].vaddr >= space->extents[i - 1].end);
			space->extents[i] = (struct extent){ raw[i].vaddr, raw[i].vaddr + length, raw[i].offset, space->bits };
			space->bits += raw[i].pages;
		}
		free(raw);
		if (!ok)
			return false;
		extents_at += (off_t)(task.extents * sizeof *raw);
		space->count = task.extents;
		struct extent *origin = malloc(space->count * sizeof *origin + 1);
		space->origin = origin;
		space->origins = space->count;
		space->installed = calloc(space->bits / 64 + 2, 8);
		space->wanted = calloc(space->bits / 64 + 2, 8);
		if (!origin || !space->installed || !space->wanted)
			return false;
		memcpy(origin, space->extents, space->count * sizeof *origin);
	}
	return true;
}

static bool add_piece(struct restore *restore, uint32_t *room, struct piece piece)
{
	if (restore->count == *room) {
		if (*room >= MAX_PIECES)
			return false;
		*room = *room ? *room * 2 : 256;
		struct piece *grown = realloc(restore->pieces, *room * sizeof *grown);
		if (!grown)
			return false;
		restore->pieces = grown;
	}
	restore->pieces[restore->count++] = piece;
	return true;
}

/* What of a working set this index has, in pieces that two threads share evenly. */
static bool load_set(struct restore *restore, int fd)
{
	struct stat info;
	struct set_head head;
	if (fstat(fd, &info) || !read_all(fd, &head, sizeof head, 0) || head.magic != SET_MAGIC ||
	    info.st_size != (off_t)(sizeof head + head.ranges * sizeof(struct set_range)))
		return false;
	struct set_range *ranges = malloc(head.ranges * sizeof *ranges + 1);
	bool ok = ranges && read_all(fd, ranges, head.ranges * sizeof *ranges, sizeof head);
	uint32_t room = 0;
	for (uint32_t i = 0; ok && i < head.ranges; i++) {
		uint64_t start = ranges[i].vaddr, end = start + ranges[i].pages * PAGE;
		ok = !(start & (PAGE - 1)) && start < 1ULL << 57;
		struct space *space = restore->prepared;
		while (ok && space && space->pid != ranges[i].pid)
			space = space->next;
		for (size_t k = space ? extent_after(space, start) : 0;
		     ok && space && k < space->count && space->extents[k].start < end; k++) {
			struct extent e = space->extents[k];
			uint64_t at = e.start > start ? e.start : start, stop = e.end < end ? e.end : end;
			for (uint64_t next; ok && at < stop; at = next) {
				next = stop - at < PUSH_CHUNK ? stop : at + PUSH_CHUNK;
				const uint8_t *data = space->file->data + e.offset + (at - e.start);
				ok = add_piece(restore, &room, (struct piece){ space, data, at, (uint32_t)((next - at) / PAGE) });
			}
		}
	}
	free(ranges);
	return ok;
}

static struct restore *restore_new(const struct command *command, const int *fds, uint32_t count)
{
	uint32_t set = command->flags & 1, first = 2 + set;
	uint64_t around = command->around;
	if (count < first || around < PAGE || around > 1 << 24 || (around & (around - 1)))
		return NULL;
	struct restore *restore = calloc(1, sizeof *restore);
	if (!restore)
		return NULL;
	restore->id = command->id;
	restore->around = command->around;
	restore->drain_ms = command->drain_ms;
	restore->connection = -1;
	restore->listener = fds[0];
	if (!load_index(restore, fds[1], fds + first, count - first)) {
		restore->listener = -1; /* the caller closes what it was given */
		restore_free(restore);
		return NULL;
	}
	/* A working set only makes things fast: one that cannot be used is left out, and READY tells of no pages. */
	if (set && !load_set(restore, fds[2]))
		restore->count = 0;
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
			warm_begin(restore);
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
		if (r->pushing)
			until = r->parts[0].blocked || r->parts[1].blocked ? RETRY_MS : 0;
		bool left = false;
		for (struct space *s = r->spaces; s; s = s->next) {
			left |= drains(s);
			if (s->pendings && until < 0)
				until = RETRY_MS;
		}
		if (until < 0 && left && r->finished && r->drain_ms != UINT32_MAX) {
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
	uint64_t one = 1;
	while (write(thread->wake, &one, sizeof one) < 0 && errno == EINTR)
		;
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
	long processors = sysconf(_SC_NPROCESSORS_ONLN);
	thread_count = processors < 2 ? 2 : processors > MAX_THREADS ? MAX_THREADS : (int)processors;
	for (int i = 0; i < thread_count; i++) {
		struct thread *thread = &threads[i];
		pthread_mutex_init(&thread->lock, NULL);
		thread->epoll = epoll_create1(EPOLL_CLOEXEC);
		thread->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = KIND_WAKE };
		if (thread->epoll < 0 || thread->wake < 0 || epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wake, &event) ||
		    pthread_create(&thread->handle, NULL, serve, thread)) {
			perror("woodfrog-pageserver: cannot start a thread");
			return 1;
		}
	}
	control();
	/* The sandboxes die with the daemon; until they have, their memory must not turn to zeroes. */
	sleep(3);
	return 0;
}
