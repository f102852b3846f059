// SPDX-License-Identifier: MIT
/* Both ends of an operation, opened by name. */
#define _GNU_SOURCE
#include "driver.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_alg.h>
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

#define XFS_MAGIC 0x58465342

/* A page-aligned buffer that every operation shares. */
void *buffer(void)
{
	static void *shared;

	if (!shared) {
		shared = mmap(NULL, BUFFER_SIZE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (shared == MAP_FAILED)
			fail("buffer");
		memset(shared, 'b', BUFFER_SIZE);
	}
	return shared;
}

static const char *filesystem(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) < 0)
		fail("fstatfs");
	switch (fs.f_type) {
	case EXT4_SUPER_MAGIC:
		return "ext4";
	case XFS_MAGIC:
		return "xfs";
	case BTRFS_SUPER_MAGIC:
		return "btrfs";
	case TMPFS_MAGIC:
		return "tmpfs";
	}
	errno = EOPNOTSUPP;
	unsupported("the file system of the scratch directory");
}

/* Fills through a mapping: no call that carries payload. */
static void fill(int fd, size_t size)
{
	char *map;

	if (ftruncate(fd, (off_t)size) < 0)
		fail("ftruncate");
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	for (size_t i = 0; i < size; i++)
		map[i] = (char)('a' + i % 23);
	munmap(map, size);
	if (fsync(fd) < 0)
		fail("fsync");
}

static size_t span(const struct options *options)
{
	return (size_t)options->offset + (size_t)options->count * options->size;
}

static void open_file(struct endpoint *end, const struct options *options, int flags, bool source)
{
	char path[64];
	int fd = open(options->directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd < 0)
		fail(options->directory);
	if (source)
		fill(fd, span(options));
	if (flags) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		end->fd = open(path, O_RDWR | O_CLOEXEC | flags);
		if (end->fd < 0)
			unsupported("O_DIRECT");
		close(fd);
	} else {
		end->fd = fd;
	}
	if (lseek(end->fd, options->offset, SEEK_SET) < 0)
		fail("lseek");
	end->seekable = true;
	snprintf(end->kind, sizeof(end->kind), "%s%s", filesystem(end->fd),
		 flags & O_DIRECT ? " O_DIRECT" : "");
}

static void open_memfd(struct endpoint *end, const struct options *options, bool source)
{
	end->fd = memfd_create("driver", MFD_CLOEXEC);
	if (end->fd < 0)
		fail("memfd");
	if (source)
		fill(end->fd, span(options));
	if (lseek(end->fd, options->offset, SEEK_SET) < 0)
		fail("lseek");
	end->seekable = true;
}

static void tcp_pair(int pair[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t length = sizeof(address);
	int one = 1;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, length) < 0 ||
	    listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &length) < 0)
		fail("listen");
	pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (pair[0] < 0 || connect(pair[0], (struct sockaddr *)&address, length) < 0)
		fail("connect");
	pair[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (pair[1] < 0)
		fail("accept");
	for (int i = 0; i < 2; i++)
		setsockopt(pair[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	close(listener);
}

static void udp_pair(int pair[2])
{
	struct sockaddr_in address[2];
	socklen_t length = sizeof(address[0]);

	for (int i = 0; i < 2; i++) {
		memset(&address[i], 0, sizeof(address[i]));
		address[i].sin_family = AF_INET;
		address[i].sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		pair[i] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		if (pair[i] < 0 || bind(pair[i], (struct sockaddr *)&address[i], length) < 0 ||
		    getsockname(pair[i], (struct sockaddr *)&address[i], &length) < 0)
			fail("udp");
	}
	for (int i = 0; i < 2; i++)
		if (connect(pair[i], (struct sockaddr *)&address[!i], length) < 0)
			fail("connect");
}

static void fifo_pair(int pair[2], const char *directory)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/fifo.%d", directory, getpid());
	if (mkfifo(path, 0600) < 0)
		fail(path);
	pair[0] = open(path, O_RDWR | O_CLOEXEC);
	pair[1] = open(path, O_RDWR | O_CLOEXEC);
	unlink(path);
	if (pair[0] < 0 || pair[1] < 0)
		fail("fifo");
}

/* A hash: what is written can be read back as one digest. */
static int open_alg(void)
{
	struct sockaddr_alg address = {
		.salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256"};
	int fd = socket(AF_ALG, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	int hash;

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		unsupported("AF_ALG");
	hash = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
	if (hash < 0)
		fail("AF_ALG");
	close(fd);
	return hash;
}

static bool open_pair(struct endpoint *end, const char *name, const struct options *options,
		      bool source)
{
	int pair[2]; /* [0] is read, [1] is written */

	if (!strcmp(name, "pipe")) {
		if (pipe2(pair, O_CLOEXEC) < 0)
			fail("pipe");
	} else if (!strcmp(name, "fifo")) {
		fifo_pair(pair, options->directory);
	} else if (!strcmp(name, "tcp")) {
		tcp_pair(pair);
	} else if (!strcmp(name, "udp")) {
		udp_pair(pair);
		end->datagram = true;
	} else if (!strcmp(name, "unix")) {
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
			fail("socketpair");
	} else if (!strcmp(name, "unixgram")) {
		if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair) < 0)
			fail("socketpair");
		end->datagram = true;
		snprintf(end->kind, sizeof(end->kind), "unix");
	} else {
		return false;
	}
	end->fd = pair[source ? 0 : 1];
	end->peer = pair[source ? 1 : 0];
	return true;
}

static void open_end(struct endpoint *end, const char *name, const struct options *options,
		     bool source)
{
	*end = (struct endpoint){.fd = -1, .peer = -1};
	snprintf(end->kind, sizeof(end->kind), "%s", name);
	if (open_pair(end, name, options, source))
		return;
	if (!strcmp(name, "file")) {
		open_file(end, options, 0, source);
	} else if (!strcmp(name, "direct")) {
		open_file(end, options, O_DIRECT, source);
	} else if (!strcmp(name, "memfd")) {
		open_memfd(end, options, source);
	} else if (!strcmp(name, "alg")) {
		end->fd = open_alg();
		snprintf(end->kind, sizeof(end->kind), "af_alg");
	} else if (name[0] == '/') {
		end->fd = open(name, O_RDWR | O_CLOEXEC);
		if (end->fd < 0)
			fail(name);
	} else {
		errno = EINVAL;
		fail(name);
	}
}

void open_source(struct endpoint *end, const struct options *options)
{
	open_end(end, options->from, options, true);
}

void open_sink(struct endpoint *end, const struct options *options)
{
	open_end(end, options->to, options, false);
}

/* Loopback may deliver late: one read must find all that one write sent. */
static void await(int fd, size_t size)
{
	int queued = 0;

	while ((size_t)queued < size) {
		struct pollfd poller = {.fd = fd, .events = POLLIN};

		if (poll(&poller, 1, 1000) < 0 || ioctl(fd, FIONREAD, &queued) < 0)
			fail("poll");
	}
}

/* Puts @size bytes where the operation will take them from. */
void supply(const struct endpoint *source, size_t size)
{
	if (source->peer >= 0)
		carried("write", USER_MEMORY, source->kind, write(source->peer, buffer(), size));
}

/* The same, and they have arrived when it returns. */
void feed(const struct endpoint *source, size_t size)
{
	supply(source, size);
	if (source->peer >= 0)
		await(source->fd, size);
}

void take(int fd, const char *kind, size_t size)
{
	while (size) {
		ssize_t got = carried("read", kind, USER_MEMORY, read(fd, buffer(), size));

		if (!got)
			break;
		size -= (size_t)got;
	}
}

/* Takes what the operation left in @sink, so that it has room again. */
void drain(const struct endpoint *sink, size_t size)
{
	if (sink->peer >= 0)
		take(sink->peer, sink->kind, size);
	else if (!strcmp(sink->kind, "af_alg"))
		take(sink->fd, sink->kind, 32);
}
