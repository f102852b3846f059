/* SPDX-License-Identifier: MIT */
/* Bytes that were taken and that no consumer took: kept in order, delivered once, or discarded. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define TOTAL (48 * KIB)

static void fill(uint8_t *bytes, size_t from, size_t size)
{
	size_t i;

	for (i = 0; i < size; i++)
		bytes[i] = pattern(from + i);
}

static void check_bytes(const uint8_t *bytes, size_t from, size_t size)
{
	size_t i;

	for (i = 0; i < size; i++)
		CHECK_EQUAL(bytes[i], pattern(from + i));
}

/* A pipe of one page that takes some bytes, then none: what the socket gave has to wait. */
static void stuck(int socket, int out[2])
{
	CHECK(!pipe2(out, O_CLOEXEC | O_NONBLOCK));
	CHECK_EQUAL(fcntl(out[1], F_SETPIPE_SZ, PAGE), PAGE);
	CHECK_EQUAL(write(out[1], "x", 1), 1);
	CHECK_FAILS(rsplice(socket, NULL, out[1], NULL, 10000, 0, NULL), EAGAIN);
	CHECK(rsplice_pending(socket) > 0);
}

static void deliver_to_pipe(int socket, int out[2])
{
	uint8_t bytes[PAGE];
	size_t have = 0;

	CHECK_EQUAL(read(out[0], bytes, 1), 1);
	while (have < TOTAL) {
		ssize_t done = rsplice(socket, NULL, out[1], NULL, 3000, 0, NULL);

		CHECK(done > 0 && done <= 3000);
		CHECK_EQUAL(read(out[0], bytes, sizeof(bytes)), done);
		check_bytes(bytes, have, (size_t)done);
		have += (size_t)done;
	}
}

static void deliver_to_memory(int socket, unsigned int kind)
{
	int memory = memfd_create("carried", kind);
	size_t have = 0;
	struct stat status;
	uint8_t *bytes;

	if (kind && fallocate(memory, 0, 0, 2 * MIB)) {
		close(memory);
		rsplice_discard(socket);
		return; /* no huge pages here: test_library.py has them reserved */
	}
	while (have < TOTAL) {
		struct rsplice_result result;
		ssize_t done = rsplice(socket, NULL, memory, NULL, TOTAL - have, 0, &result);

		CHECK(done > 0);
		CHECK_EQUAL(result.copied, done);
		have += (size_t)done;
	}
	CHECK(!fstat(memory, &status) && status.st_size == (kind ? 2 * MIB : TOTAL));
	bytes = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, memory, 0);
	CHECK(bytes != MAP_FAILED);
	check_bytes(bytes, 0, TOTAL);
	munmap(bytes, (size_t)status.st_size);
	close(memory);
}

static void deliver_to_socket(int socket)
{
	int pair[2];
	uint8_t bytes[TOTAL];
	size_t have = 0;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	while (have < TOTAL) {
		ssize_t done = rsplice(socket, NULL, pair[1], NULL, TOTAL, 0, NULL);

		CHECK(done > 0);
		CHECK_EQUAL(recv(pair[0], bytes, (size_t)done, MSG_WAITALL), done);
		check_bytes(bytes, have, (size_t)done);
		have += (size_t)done;
	}
	close(pair[0]), close(pair[1]);
}

enum where { TO_PIPE, TO_MEMORY, TO_HUGE, TO_SOCKET, TO_NOBODY, NR_WHERE };

static void try_carrying(enum where where)
{
	uint8_t bytes[TOTAL];
	int pair[2], out[2];
	size_t pending;

	about("carried over, and then to %d", where);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	fill(bytes, 0, TOTAL);
	CHECK_EQUAL(write(pair[1], bytes, TOTAL), TOTAL);
	stuck(pair[0], out);
	pending = rsplice_pending(pair[0]);
	/* Another descriptor of the socket knows of them, another socket does not. */
	{
		int same = dup(pair[0]);

		CHECK_EQUAL(rsplice_pending(same), pending);
		CHECK_EQUAL(rsplice_pending(pair[1]), 0);
		close(same);
	}
	/* They are no reason to take more. */
	CHECK_FAILS(rsplice(pair[0], NULL, out[1], NULL, 10000, 0, NULL), EAGAIN);
	CHECK_EQUAL(rsplice_pending(pair[0]), pending);
	if (where == TO_PIPE)
		deliver_to_pipe(pair[0], out);
	else if (where == TO_MEMORY)
		deliver_to_memory(pair[0], 0);
	else if (where == TO_HUGE)
		deliver_to_memory(pair[0], MFD_HUGETLB);
	else if (where == TO_SOCKET)
		deliver_to_socket(pair[0]);
	else
		rsplice_discard(pair[0]);
	CHECK_EQUAL(rsplice_pending(pair[0]), 0);
	rsplice_discard(pair[0]);
	close(pair[0]), close(pair[1]), close(out[0]), close(out[1]);
}

/* What is carried was copied already: STRICT cannot have it, and leaves it. */
static void try_strictly(void)
{
	int pair[2], out[2];
	size_t pending;

	about("carried over, and STRICT");
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK_EQUAL(write(pair[1], "bytes", 5), 5);
	stuck(pair[0], out);
	pending = rsplice_pending(pair[0]);
	CHECK_FAILS(
		rsplice(pair[0], NULL, out[1], NULL, 5, RSPLICE_F_STRICT | RSPLICE_F_SHARE, NULL),
		EOPNOTSUPP);
	CHECK_EQUAL(rsplice_pending(pair[0]), pending);
	rsplice_discard(pair[0]);
	close(pair[0]), close(pair[1]), close(out[0]), close(out[1]);
}

int main(void)
{
	enum where where;
	unsigned int before;

	limit_seconds(30);
	try_carrying(TO_PIPE);
	before = descriptors();
	for (where = TO_PIPE; where < NR_WHERE; where++)
		try_carrying(where);
	try_strictly();
	about("descriptors");
	CHECK(descriptors() <= before);
	CHECK_EQUAL(rsplice_pending(-1), 0);
	rsplice_discard(-1);
	return 0;
}
