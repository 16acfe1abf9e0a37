/*
 * A process whose memory a page server gives it: what CRIU's restore leaves behind, without CRIU.
 *
 *     victim DIRECTORY SEED OPERATIONS THREADS PAGES
 *
 * Writes the page index and the pages, strewn over several files, into DIRECTORY, says "ready", waits for a line, hands its userfaultfd to the page
 * server on DIRECTORY/socket, and then does what allocators do, in THREADS threads of PAGES pages each and in children.
 * Every page is checked against what it must be. Exits with 0, or tells what was wrong.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define GAP 16 /* the arena's last pages start unmapped */
#define FILES 3

enum state { NONE, HAS, EITHER };
struct page { uint64_t tag; unsigned char state; };
struct arena { char *base; size_t pages; struct page *model; uint64_t seed, next_tag; long operations; bool heap; };

static void die(const char *what)
{
	fprintf(stderr, "victim %d: %s: %s\n", getpid(), what, strerror(errno));
	_exit(3);
}

static uint64_t rnd(struct arena *a)
{
	a->seed ^= a->seed << 13;
	a->seed ^= a->seed >> 7;
	a->seed ^= a->seed << 17;
	return a->seed;
}

static uint64_t word(uint64_t tag, size_t i) { return tag ? tag * 0x9e3779b97f4a7c15UL + i : 0; }

static bool holds(struct arena *a, size_t p, uint64_t tag)
{
	volatile uint64_t *at = (uint64_t *)(a->base + p * PAGE);
	for (size_t i = 0; i < WORDS; i++)
		if (at[i] != word(tag, i))
			return false;
	return true;
}

static void check(struct arena *a, size_t p, const char *when)
{
	struct page *m = &a->model[p];
	if (m->state == NONE || holds(a, p, m->tag) || (m->state == EITHER && holds(a, p, 0)))
		return;
	volatile uint64_t *at = (uint64_t *)(a->base + p * PAGE);
	fprintf(stderr, "victim %d: %s: page %zu at %p must be %lx, has %lx %lx (zero %d)\n", getpid(), when, p,
		a->base + p * PAGE, word(m->tag, 0), at[0], at[1], holds(a, p, 0));
	_exit(4);
}

static void check_all(struct arena *a, const char *when)
{
	for (size_t p = 0; p < a->pages; p++)
		check(a, p, when);
}

static void store(struct arena *a, size_t p)
{
	struct page *m = &a->model[p];
	if (m->state == NONE)
		return;
	*m = (struct page){ ++a->next_tag, HAS };
	uint64_t *at = (uint64_t *)(a->base + p * PAGE);
	for (size_t i = 0; i < WORDS; i++)
		at[i] = word(m->tag, i);
}

static void become(struct arena *a, size_t from, size_t n, enum state state)
{
	for (size_t p = from; p < from + n; p++)
		a->model[p] = (struct page){ 0, (unsigned char)state };
}

/* How many pages from `from` on are mapped (or not), at most n. */
static size_t run_of(struct arena *a, size_t from, size_t n, bool mapped)
{
	size_t k = 0;
	while (k < n && from + k < a->pages && (a->model[from + k].state != NONE) == mapped)
		k++;
	return k;
}

/* How much of [start, end) lies in the map of `start`: a move over several is refused half-way. No malloc in here. */
static size_t one_map(uint64_t start, uint64_t end)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	char line[512];
	size_t have = 0;
	char buffer[4096];
	for (ssize_t got; (got = read(fd, buffer, sizeof buffer)) > 0;)
		for (ssize_t i = 0; i < got; i++) {
			if (have < sizeof line - 1)
				line[have++] = buffer[i];
			if (buffer[i] != '\n')
				continue;
			line[have] = 0;
			have = 0;
			char *dash;
			uint64_t from = strtoul(line, &dash, 16), to = strtoul(dash + 1, NULL, 16);
			if (from <= start && start < to) {
				close(fd);
				return to < end ? to - start : end - start;
			}
		}
	close(fd);
	return 0;
}

static void operate(struct arena *a, int depth);

static void child(struct arena *a, int depth)
{
	/* What the kernel empties for the child, and tells nobody. */
	size_t wiped = rnd(a) % a->pages;
	char *wipe = a->base + wiped * PAGE;
	bool wipes = a->model[wiped].state == HAS;
	if (wipes) {
		check(a, wiped, "to be wiped");
		if (madvise(wipe, PAGE, MADV_WIPEONFORK))
			die("MADV_WIPEONFORK");
	}
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (wipes && madvise(wipe, PAGE, MADV_KEEPONFORK))
		die("MADV_KEEPONFORK");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (wipes)
			become(a, wiped, 1, HAS);
		check(a, wiped, "wiped");
		a->seed ^= 0x5555;
		a->operations = 60;
		operate(a, depth + 1);
		check_all(a, "child");
		_exit(0);
	}
	for (int i = 0; i < 20; i++) { /* both sides touch */
		check(a, rnd(a) % a->pages, "parent beside its child");
		store(a, rnd(a) % a->pages);
	}
	int status;
	if (waitpid(pid, &status, 0) != pid || status) {
		fprintf(stderr, "victim %d: child %d ended with %x\n", getpid(), pid, status);
		_exit(5);
	}
}

static void operate(struct arena *a, int depth)
{
	for (; a->operations > 0; a->operations--) {
		size_t p = rnd(a) % a->pages, n = 1 + rnd(a) % (rnd(a) % 8 ? 12 : 200);
		char *at = a->base + p * PAGE;
		unsigned what = (unsigned)(rnd(a) % 100);
		size_t mapped = run_of(a, p, n, true);
		if (a->heap && what >= 70)
			what = 96;
		if (what < 35) {
			check(a, p, "read");
		} else if (what < 50) {
			store(a, p);
		} else if (what < 58 && mapped) {
			if (madvise(at, mapped * PAGE, MADV_DONTNEED))
				die("MADV_DONTNEED");
			become(a, p, mapped, HAS);
			check(a, p, "after MADV_DONTNEED");
		} else if (what < 62 && mapped) {
			if (madvise(at, mapped * PAGE, MADV_FREE))
				die("MADV_FREE");
			for (size_t k = p; k < p + mapped; k++)
				a->model[k].state = EITHER;
		} else if (what < 70 && mapped) {
			for (size_t k = p; k < p + mapped; k++)
				check(a, k, "run");
		} else if (what < 76 && mapped) {
			if (munmap(at, mapped * PAGE))
				die("munmap");
			become(a, p, mapped, NONE);
		} else if (what < 80) {
			n = n < a->pages - p ? n : a->pages - p;
			if (mmap(at, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at)
				die("mmap");
			become(a, p, n, HAS);
		} else if (what < 90 && mapped) {
			mapped = one_map((uint64_t)at, (uint64_t)at + mapped * PAGE) / PAGE;
			size_t q = rnd(a) % (a->pages - mapped);
			if (!mapped || (q + mapped > p && q < p + mapped))
				continue;
			int keep = what >= 87 ? MREMAP_DONTUNMAP : 0;
			char *to = a->base + q * PAGE;
			if (mremap(at, mapped * PAGE, mapped * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | keep, to) != to)
				die("mremap");
			for (size_t k = 0; k < mapped; k++) {
				a->model[q + k] = a->model[p + k];
				a->model[p + k] = (struct page){ 0, keep ? HAS : NONE };
			}
			if (keep)
				check(a, p, "left behind by mremap");
			check(a, q, "after mremap");
		} else if (what < 93 && mapped > 1) {
			mapped = one_map((uint64_t)at, (uint64_t)at + mapped * PAGE) / PAGE;
			size_t less = mapped / 2;
			if (less && mremap(at, mapped * PAGE, less * PAGE, 0) == at)
				become(a, p + less, mapped - less, NONE);
		} else if (what < 96 && mapped) {
			size_t room = run_of(a, p + mapped, n, false);
			if (room && one_map((uint64_t)at, (uint64_t)at + mapped * PAGE) == mapped * PAGE && mremap(at, mapped * PAGE, (mapped + room) * PAGE, 0) == at) {
				become(a, p + mapped, room, HAS);
				check(a, p + mapped, "grown in place");
			}
		} else if (what < 98) {
			if (a->heap) { /* the heap: shrink, and grow again */
				size_t keep = a->pages - GAP - rnd(a) % (a->pages / 2);
				if (brk(a->base + keep * PAGE))
					die("brk down");
				become(a, keep, a->pages - keep, NONE);
				if (brk(a->base + a->pages * PAGE))
					die("brk up");
				become(a, keep, a->pages - keep, HAS);
				check(a, keep, "after brk");
			}
		} else if (depth < 2 && rnd(a) % 4 == 0) {
			child(a, depth);
		} else if (depth < 2 && rnd(a) % 16 == 0) {
			pid_t pid = fork();
			if (pid == 0) {
				execl("/bin/true", "true", NULL);
				_exit(9);
			}
			int status;
			if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
				die("fork and exec");
		}
	}
}

static void *thread(void *argument)
{
	operate(argument, 0);
	check_all(argument, "at the end");
	return NULL;
}

static void put(int fd, const void *data, size_t length)
{
	if (write(fd, data, length) != (ssize_t)length)
		die("write");
}

static int open_in(const char *directory, const char *name)
{
	char path[512];
	snprintf(path, sizeof path, "%s/%s", directory, name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die(path);
	return fd;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	const char *directory = argv[1];
	uint64_t seed = strtoul(argv[2], NULL, 10);
	long operations = atol(argv[3]);
	int threads = atoi(argv[4]);
	size_t pages = (size_t)atol(argv[5]);
	struct arena *arenas = calloc((size_t)threads, sizeof *arenas);
	setvbuf(stdout, NULL, _IONBF, 0);
	for (int t = 0; t < threads; t++) {
		struct arena *a = &arenas[t];
		a->pages = pages;
		a->seed = (seed + (uint64_t)t) * 0x2545f4914f6cdd1dUL | 1;
		a->next_tag = (uint64_t)(t + 1) << 40;
		a->operations = operations;
		a->model = mmap(NULL, pages * sizeof *a->model, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		a->heap = t == threads - 1 && threads > 1;
	}
	/* Nothing here uses the heap from now on, except as an arena. Lowest first: the index is in order. */
	struct arena *heap = arenas[threads - 1].heap ? &arenas[threads - 1] : NULL;
	if (heap) {
		heap->base = (char *)(((uint64_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
		if (brk(heap->base + pages * PAGE))
			die("brk");
	}
	for (int t = 0; t < threads - !!heap; t++) {
		arenas[t].base = (char *)(0x600000000000UL + (uint64_t)t * 2 * pages * PAGE);
		if (mmap(arenas[t].base, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
		    arenas[t].base)
			die("mmap");
	}
	int index = open_in(directory, "index"), list = open_in(directory, "extents"), data[FILES];
	for (int f = 0; f < FILES; f++)
		data[f] = open_in(directory, (char[]){ 'p', 'a', 'g', 'e', 's', (char)('0' + f), 0 });
	uint64_t offset[FILES] = { 0 };
	uint32_t extents = 0;
	for (int k = 0; k < threads; k++) {
		struct arena *a = heap ? (k ? &arenas[k - 1] : heap) : &arenas[k];
		for (size_t p = 0; p < pages;) {
			size_t n = 1 + rnd(a) % (rnd(a) % 3 ? 9 : 300);
			n = n < pages - p ? n : pages - p;
			bool hole = rnd(a) % 4 == 0;
			uint32_t file = (uint32_t)(rnd(a) % FILES);
			for (size_t i = p; i < p + n; i++) {
				a->model[i] = (struct page){ hole ? 0 : ++a->next_tag, HAS };
				uint64_t page[WORDS];
				for (size_t w = 0; w < WORDS; w++)
					page[w] = word(a->model[i].tag, w);
				if (!hole)
					put(data[file], page, sizeof page);
			}
			if (!hole) {
				uint64_t extent[4] = { (uint64_t)a->base + p * PAGE, n, offset[file], file };
				put(list, extent, sizeof extent);
				extents++;
				offset[file] += n * PAGE;
			}
			p += n;
		}
	}
	struct { uint64_t magic; uint32_t tasks, files; int32_t pid; uint32_t extents; } head = {
		0x32584449474f5246UL, 1, FILES, getpid(), extents,
	};
	put(index, &head, sizeof head);
	close(list);
	char path[512], buffer[65536];
	snprintf(path, sizeof path, "%s/extents", directory);
	list = open(path, O_RDONLY | O_CLOEXEC);
	for (ssize_t got; (got = read(list, buffer, sizeof buffer)) > 0;)
		put(index, buffer, (size_t)got);
	for (int f = 0; f < FILES; f++) {
		put(index, (char[64]){ 'p', 'a', 'g', 'e', 's', (char)('0' + f) }, 64);
		close(data[f]);
	}
	close(index);

	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
			    UFFD_FEATURE_EVENT_UNMAP,
	};
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
	for (int t = 0; t < threads; t++) {
		struct uffdio_register area = {
			.range = { (uint64_t)arenas[t].base, pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
		};
		if (ioctl(uffd, UFFDIO_REGISTER, &area))
			die("UFFDIO_REGISTER");
	}
	printf("ready\n");
	char line;
	if (read(0, &line, 1) != 1)
		return 0;
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	snprintf(address.sun_path, sizeof address.sun_path, "%s/socket", directory);
	if (connect(sock, (struct sockaddr *)&address, sizeof address))
		die("connect");
	int32_t zombie = -7, pid = getpid();
	uint32_t finished = 0x52535446;
	put(sock, &zombie, 4);
	put(sock, &pid, 4);
	struct iovec part = { &(char){ 1 }, 1 };
	union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { 0 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space };
	struct cmsghdr *c = CMSG_FIRSTHDR(&message);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof uffd);
	if (sendmsg(sock, &message, 0) != 1)
		die("sendmsg");
	put(sock, &finished, 4);
	close(uffd);
	close(sock);

	pthread_t handles[64];
	for (int t = 0; t < threads; t++)
		if (pthread_create(&handles[t], NULL, thread, &arenas[t]))
			die("pthread_create");
	for (int t = 0; t < threads; t++)
		pthread_join(handles[t], NULL);
	printf("done\n");
	if (read(0, &line, 1) < 0) /* alive until told */
		return 1;
	for (int t = 0; t < threads; t++)
		check_all(&arenas[t], "in the end");
	return 0;
}
