/* SPDX-License-Identifier: MIT */
/* Sources and consumers of every kind: see check.h. */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/loop.h>
#include <linux/magic.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define MOST_QUEUED (64u * KIB)
#define NR_FILES    64

const char *const origin_names[NR_ORIGINS] = {"file O_DIRECT", "file",		"tmpfs file",
					      "block device",  "/dev/zero",	"TCP",
					      "unix stream",   "unix datagram", "pipe"};
const char *const sink_names[NR_SINKS] = {"pipe",    "tiny pipe",   "memfd", "tmpfs file",
					  "hugetlb", "unix stream", "TCP",   "FUSE reply"};

/* Files are written once: each opening of an origin opens them anew. */
static struct {
	enum origin_kind kind;
	size_t size;
	int fd;
} files[NR_FILES];
static unsigned int nr_files;

static void write_pattern(int fd, size_t size)
{
	uint8_t bytes[16 * KIB];
	size_t at, i, part;

	for (at = 0; at < size; at += part) {
		part = size - at < sizeof(bytes) ? size - at : sizeof(bytes);
		for (i = 0; i < part; i++)
			bytes[i] = pattern(at + i);
		CHECK_EQUAL(write(fd, bytes, part), part);
	}
}

static int reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

/* -1 with errno */
static int loop_device(int backing)
{
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	struct loop_config config = {.fd = (uint32_t)backing, .block_size = 512};
	char path[32];
	int number, fd = -1;

	config.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_READ_ONLY;
	if (control < 0)
		return -1;
	do { /* somebody else may have been quicker */
		number = ioctl(control, LOOP_CTL_GET_FREE);
		if (number < 0)
			break;
		snprintf(path, sizeof(path), "/dev/loop%d", number);
		if (fd >= 0)
			close(fd);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0 && !ioctl(fd, LOOP_CONFIGURE, &config)) {
			close(control);
			return fd;
		}
	} while (fd >= 0 && errno == EBUSY);
	close(control);
	if (fd >= 0)
		close(fd);
	return -1;
}

static int make_file(enum origin_kind kind, size_t size)
{
	int backing, fd;

	if (kind == ORIGIN_TMPFS)
		return memory_of(size);
	backing = scratch_file(0);
	write_pattern(backing, size);
	CHECK(!fsync(backing));
	if (kind != ORIGIN_BLOCK)
		return backing;
	fd = loop_device(backing);
	close(backing);
	return fd;
}

static int file_of(enum origin_kind kind, size_t size)
{
	unsigned int i;

	if (kind == ORIGIN_DIRECT)
		kind = ORIGIN_BUFFERED;
	for (i = 0; i < nr_files; i++) {
		if (files[i].kind == kind && files[i].size == size)
			return files[i].fd;
	}
	if (nr_files == NR_FILES)
		close(files[i = size % NR_FILES].fd);
	else
		nr_files++;
	files[i].kind = kind;
	files[i].size = size;
	files[i].fd = make_file(kind, size);
	return files[i].fd;
}

static const char *open_file(struct origin *origin)
{
	int fd;

	if (origin->kind == ORIGIN_BLOCK)
		origin->size = (origin->size + 511) / 512 * 512;
	fd = file_of(origin->kind, origin->size);
	if (fd < 0)
		return "no loop device to be had (root, and the loop module)";
	origin->fd = reopen(fd, O_RDONLY | (origin->kind == ORIGIN_DIRECT ? O_DIRECT : 0));
	if (origin->fd < 0 && errno == EINVAL)
		return "no O_DIRECT on this filesystem";
	CHECK(origin->fd >= 0);
	origin->seekable = true;
	return NULL;
}

static void tcp_pair(int pair[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(!bind(listener, (struct sockaddr *)&address, size) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &size));
	pair[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!connect(pair[1], (struct sockaddr *)&address, size));
	pair[0] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(pair[0] >= 0);
	CHECK(!setsockopt(pair[1], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)));
	close(listener);
}

/* pair[1] is written to, pair[0] read from. */
static void make_pair(enum origin_kind kind, int pair[2])
{
	int size = 2 * MIB;

	if (kind == ORIGIN_PIPE)
		CHECK(!pipe2(pair, O_CLOEXEC));
	else if (kind == ORIGIN_TCP)
		tcp_pair(pair);
	else
		CHECK(!socketpair(AF_UNIX,
				  SOCK_CLOEXEC | (kind == ORIGIN_UNIX ? SOCK_STREAM : SOCK_DGRAM),
				  0, pair));
	if (kind == ORIGIN_PIPE)
		return;
	setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	setsockopt(pair[1], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
}

size_t origin_waiting(const struct origin *origin)
{
	int ready = 0;

	if (origin->seekable || origin->kind == ORIGIN_ZERO)
		return 0;
	CHECK(!ioctl(origin->fd, FIONREAD, &ready));
	return (size_t)ready;
}

static void send_messages(int fd, size_t size)
{
	uint8_t message[MESSAGE];
	size_t at, i, part;

	for (at = 0; at < size; at += part) {
		part = size - at < MESSAGE ? size - at : MESSAGE;
		for (i = 0; i < part; i++)
			message[i] = pattern(at + i);
		CHECK_EQUAL(send(fd, message, part, 0), part);
	}
}

/* Everything is sent before the first call: nobody need run beside it. */
static const char *open_queue(struct origin *origin)
{
	int pair[2], tries;

	/* As many messages as a socket queues without a reader: net.unix.max_dgram_qlen. */
	if (origin->kind == ORIGIN_DGRAM && origin->size > 10 * MESSAGE)
		origin->size = 10 * MESSAGE;
	if (origin->size > MOST_QUEUED)
		origin->size = MOST_QUEUED;
	make_pair(origin->kind, pair);
	if (origin->kind == ORIGIN_DGRAM)
		send_messages(pair[1], origin->size);
	else
		write_pattern(pair[1], origin->size);
	origin->fd = pair[0];
	close(pair[1]);
	origin->ends = origin->kind != ORIGIN_DGRAM;
	for (tries = 0; origin->ends && origin_waiting(origin) < origin->size; tries++) {
		CHECK(tries < 5000);
		usleep(1000);
	}
	return NULL;
}

const char *origin_open(struct origin *origin, enum origin_kind kind, size_t size)
{
	*origin = (struct origin){.kind = kind, .size = size, .ends = true};
	switch (kind) {
	case ORIGIN_DIRECT:
	case ORIGIN_BUFFERED:
	case ORIGIN_TMPFS:
	case ORIGIN_BLOCK:
		return open_file(origin);
	case ORIGIN_ZERO:
		origin->fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		origin->ends = false;
		return origin->fd < 0 ? "no /dev/zero" : NULL;
	default:
		return open_queue(origin);
	}
}

void origin_close(struct origin *origin)
{
	CHECK(!close(origin->fd));
}

uint8_t origin_byte(const struct origin *origin, size_t i)
{
	return origin->kind == ORIGIN_ZERO ? 0 : pattern(i);
}

bool origin_certain(const struct origin *origin)
{
	struct statfs filesystem;

	if (origin->kind == ORIGIN_BLOCK)
		return true;
	if (origin->kind != ORIGIN_DIRECT && origin->kind != ORIGIN_BUFFERED)
		return false;
	CHECK(!fstatfs(origin->fd, &filesystem));
	return filesystem.f_type == EXT4_SUPER_MAGIC || filesystem.f_type == XFS_SUPER_MAGIC ||
	       filesystem.f_type == F2FS_SUPER_MAGIC;
}

bool sink_in_memory(const struct sink *sink)
{
	return sink->kind == SINK_MEMFD || sink->kind == SINK_TMPFS || sink->kind == SINK_HUGE;
}

static const char *open_memory(struct sink *sink)
{
	struct statfs filesystem;

	sink->reader = -1;
	if (sink->kind == SINK_TMPFS)
		sink->fd = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	else
		sink->fd = memfd_create("sink",
					MFD_CLOEXEC | (sink->kind == SINK_HUGE ? MFD_HUGETLB : 0));
	if (sink->fd < 0)
		return sink->kind == SINK_HUGE ? "no hugetlbfs" : "no tmpfs on /dev/shm";
	if (sink->kind != SINK_HUGE)
		return NULL;
	CHECK(!fstatfs(sink->fd, &filesystem));
	sink->blocks = (size_t)filesystem.f_bsize;
	if (!fallocate(sink->fd, 0, 0, (off_t)sink->blocks))
		return ftruncate(sink->fd, 0) ? "a hugetlb file that cannot be cut" : NULL;
	close(sink->fd);
	return "no huge pages are reserved (vm.nr_hugepages)";
}

static void open_pipe(struct sink *sink)
{
	int ends[2];

	CHECK(!pipe2(ends, O_CLOEXEC));
	CHECK(fcntl(ends[1], F_SETPIPE_SZ, sink->kind == SINK_TINY ? PAGE : MIB) > 0);
	sink->fd = ends[1];
	sink->reader = ends[0];
}

const char *sink_open(struct sink *sink, enum sink_kind kind, size_t start)
{
	int pair[2];

	*sink = (struct sink){.kind = kind, .start = start, .blocks = 1};
	if (sink_in_memory(sink))
		return open_memory(sink);
	sink->start = 0;
	if (kind == SINK_UNIX || kind == SINK_TCP) {
		make_pair(kind == SINK_UNIX ? ORIGIN_UNIX : ORIGIN_TCP, pair);
		sink->reader = pair[0];
		sink->fd = pair[1];
	} else {
		open_pipe(sink);
	}
	return NULL;
}

void sink_close(struct sink *sink)
{
	CHECK(!close(sink->fd));
	if (sink->reader >= 0)
		CHECK(!close(sink->reader));
}

static void read_all(int fd, void *bytes, size_t size)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
	size_t have = 0;

	while (have < size) {
		ssize_t got;

		if (poll(&poll_fd, 1, 5000) != 1) {
			CHECK_EQUAL(have, size);
			return;
		}
		got = read(fd, (char *)bytes + have, size - have);
		CHECK(got > 0);
		have += (size_t)got;
	}
}

static void take_reply(struct sink *sink, uint8_t *bytes, size_t expected)
{
	struct fuse_out_header header;
	int ready = 0;

	CHECK(!ioctl(sink->reader, FIONREAD, &ready));
	if (!ready && !expected)
		return; /* a call that failed */
	read_all(sink->reader, &header, sizeof(header));
	CHECK_EQUAL(header.unique, 23);
	CHECK_EQUAL(header.error, 0);
	CHECK_EQUAL(header.len, sizeof(header) + expected);
	read_all(sink->reader, bytes, expected);
}

static void take_memory(struct sink *sink, uint8_t *bytes, size_t expected)
{
	size_t begin = sink->start + sink->taken, end = begin + expected, i;
	uint8_t behind[64 * KIB];
	struct stat status;
	ssize_t got;

	if (!sink->taken && !expected)
		end = 0;
	CHECK(!fstat(sink->fd, &status));
	if (!sink->loose)
		CHECK_EQUAL(status.st_size, (end + sink->blocks - 1) / sink->blocks * sink->blocks);
	CHECK_EQUAL(pread(sink->fd, bytes, expected, (off_t)begin), expected);
	for (; (got = pread(sink->fd, behind, sizeof(behind), (off_t)end)) > 0;
	     end += (size_t)got) {
		for (i = 0; i < (size_t)got; i++)
			CHECK_EQUAL(behind[i], 0);
	}
}

void sink_take(struct sink *sink, uint8_t *bytes, size_t expected)
{
	int more = 0;

	if (sink_in_memory(sink)) {
		take_memory(sink, bytes, expected);
	} else {
		if (sink->kind == SINK_FUSE)
			take_reply(sink, bytes, expected);
		else
			read_all(sink->reader, bytes, expected);
		CHECK(!ioctl(sink->reader, FIONREAD, &more));
		CHECK_EQUAL(more, 0);
	}
	sink->taken += expected;
}
