/* SPDX-License-Identifier: MIT */
/* Every error of rsplice(3), and that it leaves both ends where they were. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static int ends[2]; /* a pipe */

static ssize_t to(int fd_out, int fd_in, size_t len, unsigned int flags)
{
	return rsplice(fd_in, NULL, fd_out, NULL, len, flags, NULL);
}

static ssize_t at(int fd_in, int64_t offset, int fd_out, int64_t out, size_t len)
{
	int64_t in = offset;
	ssize_t done = rsplice(fd_in, &in, fd_out, out == -2 ? NULL : &out, len, 0, NULL);

	CHECK(done > 0 || in == offset);
	return done;
}

static int queued(int fd)
{
	int bytes = 0;

	CHECK(!ioctl(fd, FIONREAD, &bytes));
	return bytes;
}

static void bad_arguments(void)
{
	int file = memory_of(PAGE), closed = dup(file), zero = open("/dev/zero", O_RDONLY);
	struct rsplice_request *none = NULL;
	int64_t offset = 0;

	about("arguments");
	close(closed);
	CHECK_FAILS(to(ends[1], closed, 1, 0), EBADF);
	CHECK_FAILS(to(closed, file, 1, 0), EBADF);
	CHECK_FAILS(to(-1, file, 1, 0), EBADF);
	CHECK_FAILS(to(ends[1], -1, 1, 0), EBADF);
	CHECK_FAILS(to(ends[1], file, 1, 0x4000), EINVAL);
	CHECK_FAILS(to(ends[1], file, 1, RSPLICE_F_EXACT), EINVAL);
	CHECK_FAILS(to(ends[1], file, 1, RSPLICE_F_READAHEAD), EINVAL);
	CHECK_FAILS(to(ends[1], file, (size_t)SSIZE_MAX + 1, 0), EINVAL);
	CHECK_FAILS(at(file, -1, ends[1], -2, 1), EINVAL);
	CHECK_FAILS(at(file, INT64_MIN, ends[1], -2, 1), EINVAL);
	CHECK_FAILS(at(zero, -1, ends[1], -2, 1), EINVAL);
	CHECK_FAILS(rsplice_fuse_reply(ends[1], 1, file, &offset, 1, RSPLICE_F_MORE, NULL), EINVAL);
	CHECK_FAILS(rsplice_fuse_reply(ends[1], 1, file, &offset, PAGE,
				       RSPLICE_F_STRICT | RSPLICE_F_READAHEAD, NULL),
		    EINVAL);
	CHECK_FAILS(rsplice_fuse_reply(ends[1], 1, file, &offset, (1UL << 28) + 1, 0, NULL),
		    EINVAL);
	CHECK_FAILS(rsplice_batch(none, 1, 0), EINVAL);
	CHECK_EQUAL(rsplice_batch(none, 0, 0), 0);
	CHECK_EQUAL(to(ends[1], file, 0, 0), 0);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	CHECK_EQUAL(queued(ends[0]), 0);
	close(file);
	close(zero);
}

static void bad_kinds(void)
{
	int file = memory_of(PAGE), directory = open("/", O_RDONLY | O_DIRECTORY);
	int disk = scratch_file(0), null = open("/dev/null", O_WRONLY), other[2], pair[2];
	int path = open("/proc/self/exe", O_PATH),
	    terminal = open("/dev/ptmx", O_RDONLY | O_NOCTTY);

	about("kinds of descriptors");
	CHECK(!pipe(other) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK_FAILS(to(ends[1], directory, 1, 0), EISDIR);
	CHECK_FAILS(to(disk, file, 1, 0), EOPNOTSUPP);
	CHECK_FAILS(to(null, file, 1, 0), EOPNOTSUPP);
	CHECK_FAILS(to(ends[1], other[1], 1, 0), EBADF);
	CHECK_FAILS(to(other[0], file, 1, 0), EBADF);
	CHECK_FAILS(to(ends[1], null, 1, 0), EBADF);
	CHECK_FAILS(at(path, 0, ends[1], -2, 1), EBADF);
	CHECK_FAILS(to(ends[1], path, 1, 0), EBADF);
	if (terminal >= 0)
		CHECK_FAILS(to(ends[1], terminal, 1, 0), EINVAL);
	CHECK_FAILS(at(other[0], 0, ends[1], -2, 1), ESPIPE);
	CHECK_FAILS(at(pair[0], 0, ends[1], -2, 1), ESPIPE);
	CHECK_FAILS(at(file, 0, ends[1], 0, 1), ESPIPE);
	CHECK_FAILS(at(file, 0, pair[1], 0, 1), ESPIPE);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	CHECK_EQUAL(queued(ends[0]), 0);
	close(file), close(directory), close(disk), close(null), close(path), close(terminal);
	close(other[0]), close(other[1]), close(pair[0]), close(pair[1]);
}

static void would_wait(void)
{
	int file = memory_of(2 * PAGE), other[2], pair[2], soon[2];
	struct timeval limit = {.tv_usec = 20000};
	char byte = 'x';

	about("EAGAIN");
	CHECK(!pipe2(other, O_CLOEXEC) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK_FAILS(to(ends[1], other[0], 1, RSPLICE_F_NONBLOCK), EAGAIN);
	CHECK_FAILS(to(ends[1], pair[0], 1, RSPLICE_F_NONBLOCK), EAGAIN);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, soon));
	CHECK_FAILS(to(ends[1], soon[0], 1, 0), EAGAIN);
	CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	CHECK_FAILS(to(ends[1], pair[0], 1, 0), EAGAIN);

	/* A pipe without room: nothing is taken from what cannot be read again. */
	CHECK(fcntl(other[1], F_SETPIPE_SZ, PAGE) == PAGE);
	CHECK_EQUAL(to(other[1], file, PAGE, 0), PAGE);
	CHECK_EQUAL(write(pair[1], &byte, 1), 1);
	CHECK_FAILS(to(other[1], pair[0], 1, RSPLICE_F_NONBLOCK), EAGAIN);
	CHECK_EQUAL(queued(pair[0]), 1);
	CHECK_EQUAL(rsplice_pending(pair[0]), 0);
	CHECK_FAILS(to(other[1], file, PAGE, RSPLICE_F_NONBLOCK), EAGAIN);
	CHECK(!fcntl(other[1], F_SETFL, O_NONBLOCK));
	CHECK_FAILS(to(other[1], file, PAGE, 0), EAGAIN);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), PAGE);
	/* Without the flag, the descriptor's O_NONBLOCK has the byte carried over. */
	CHECK_FAILS(to(other[1], pair[0], 1, 0), EAGAIN);
	CHECK_EQUAL(queued(pair[0]) + (int)rsplice_pending(pair[0]), 1);
	rsplice_discard(pair[0]);

	about("SO_SNDTIMEO");
	CHECK(!setsockopt(soon[1], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)));
	CHECK(!fcntl(soon[1], F_SETFL, 0));
	{
		int zero = open("/dev/zero", O_RDONLY);

		while (to(soon[1], zero, 256 * KIB, 0) > 0)
			;
		CHECK_EQUAL(errno, EAGAIN);
		close(zero);
	}
	close(file), close(other[0]), close(other[1]), close(pair[0]), close(pair[1]);
	close(soon[0]), close(soon[1]);
}

static void nobody_listens(void)
{
	int file = memory_of(PAGE), other[2], pair[2];
	char byte = 'x';

	about("EPIPE");
	CHECK(!pipe(other) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	close(other[0]);
	CHECK_FAILS(to(other[1], file, PAGE, 0), EPIPE);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	CHECK_EQUAL(write(pair[1], &byte, 1), 1);
	CHECK_FAILS(to(other[1], pair[0], 1, 0), EPIPE);
	CHECK_EQUAL(queued(pair[0]) + (int)rsplice_pending(pair[0]), 1);
	CHECK_EQUAL(to(ends[1], pair[0], 1, 0), 1);
	CHECK(read(ends[0], &byte, 1) == 1 && byte == 'x');
	close(pair[0]);
	CHECK_FAILS(to(pair[1], file, PAGE, 0), EPIPE);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	close(file), close(other[1]), close(pair[1]);
}

static void strict(void)
{
	int file = memory_of(PAGE), memory = memfd_create("m", 0),
	    zero = open("/dev/zero", O_RDONLY);
	int other[2], pair[2];
	struct stat status;
	char byte = 'x';

	about("STRICT");
	CHECK(!pipe(other) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(write(other[1], &byte, 1) == 1 && write(pair[1], &byte, 1) == 1);
	CHECK_FAILS(to(ends[1], file, PAGE, RSPLICE_F_STRICT), EOPNOTSUPP);
	CHECK_FAILS(to(memory, file, PAGE, RSPLICE_F_STRICT | RSPLICE_F_SHARE), EOPNOTSUPP);
	CHECK_FAILS(to(ends[1], zero, PAGE, RSPLICE_F_STRICT), EOPNOTSUPP);
	CHECK_FAILS(to(ends[1], pair[0], PAGE, RSPLICE_F_STRICT), EOPNOTSUPP);
	CHECK_FAILS(to(memory, pair[0], PAGE, RSPLICE_F_STRICT), EOPNOTSUPP);
	CHECK_FAILS(to(memory, other[0], PAGE, RSPLICE_F_STRICT), EOPNOTSUPP);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	CHECK(queued(pair[0]) == 1 && queued(other[0]) == 1 && !queued(ends[0]));
	CHECK_EQUAL(rsplice_pending(pair[0]) + rsplice_pending(other[0]), 0);
	CHECK(!fstat(memory, &status) && !status.st_size);
	/* Reference by reference nothing is copied. */
	CHECK_EQUAL(to(ends[1], other[0], PAGE, RSPLICE_F_STRICT), 1);
	CHECK_EQUAL(to(ends[1], pair[0], PAGE, RSPLICE_F_STRICT | RSPLICE_F_SHARE), 1);
	CHECK_EQUAL(to(ends[1], file, PAGE, RSPLICE_F_STRICT | RSPLICE_F_SHARE), PAGE);
	CHECK_EQUAL(queued(ends[0]), PAGE + 2);
	while (queued(ends[0]))
		CHECK_EQUAL(read(ends[0], &byte, 1), 1);
	close(file), close(memory), close(zero);
	close(other[0]), close(other[1]), close(pair[0]), close(pair[1]);
}

static int reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

static void memory_refuses(void)
{
	int file = memory_of(2 * PAGE), memory = memfd_create("m", MFD_ALLOW_SEALING);
	int reader = reopen(memory, O_RDONLY), writer = reopen(memory, O_WRONLY);
	int adder = reopen(memory, O_RDWR | O_APPEND);
	struct stat status;

	about("files in memory");
	CHECK_FAILS(to(reader, file, 1, 0), EBADF);
	CHECK_FAILS(to(writer, file, 1, 0), EBADF);
	CHECK_FAILS(to(adder, file, 1, 0), EINVAL);
	CHECK_FAILS(to(file, file, 1, 0), EINVAL);
	CHECK_FAILS(at(file, 0, memory, -1, 1), EINVAL);
	CHECK_FAILS(at(file, 0, memory, INT64_MAX - 5, 100), EFBIG);
	CHECK_FAILS(at(file, 0, memory, INT64_MAX, 1), EFBIG);
	CHECK(!fstat(memory, &status) && !status.st_size);

	CHECK(!ftruncate(memory, PAGE));
	CHECK(!fcntl(memory, F_ADD_SEALS, F_SEAL_GROW));
	CHECK_FAILS(to(memory, file, PAGE + 1, 0), EPERM);
	CHECK_EQUAL(to(memory, file, PAGE, 0), PAGE);
	CHECK_FAILS(to(memory, file, 1, 0), EPERM);
	CHECK(!fcntl(memory, F_ADD_SEALS, F_SEAL_WRITE));
	CHECK_FAILS(at(file, 0, memory, 0, 1), EPERM);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), PAGE);
	CHECK(!fstat(memory, &status) && status.st_size == PAGE);
	close(file), close(memory), close(reader), close(writer), close(adder);
}

static void too_large(void)
{
	int file = memory_of(4 * PAGE), memory = memfd_create("m", 0);
	struct rlimit old, small = {2 * PAGE, RLIM_INFINITY};
	struct stat status;

	about("RLIMIT_FSIZE");
	signal(SIGXFSZ, SIG_IGN);
	CHECK(!getrlimit(RLIMIT_FSIZE, &old));
	small.rlim_max = old.rlim_max;
	CHECK(!setrlimit(RLIMIT_FSIZE, &small));
	CHECK_FAILS(to(memory, file, 4 * PAGE, 0), EFBIG);
	CHECK(!fstat(memory, &status) && !status.st_size);
	CHECK_EQUAL(to(memory, file, 2 * PAGE, 0), 2 * PAGE);
	CHECK(!setrlimit(RLIMIT_FSIZE, &old));
	close(file), close(memory);
}

static void no_space(void)
{
	char point[4096], path[4096 + 8];
	int file = memory_of(MIB), memory;
	struct stat status;

	about("ENOSPC");
	scratch_directory(point, sizeof(point));
	if (mount("none", point, "tmpfs", 0, "size=64k")) {
		fprintf(stderr, "lacking: ENOSPC needs the right to mount a tmpfs\n");
		rmdir(point);
		return;
	}
	snprintf(path, sizeof(path), "%s/file", point);
	memory = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	umount2(point, MNT_DETACH);
	rmdir(point);
	CHECK(memory >= 0);
	CHECK_FAILS(to(memory, file, MIB, 0), ENOSPC);
	CHECK(!fstat(memory, &status) && !status.st_size && !status.st_blocks);
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), 0);
	CHECK_EQUAL(to(memory, file, 32 * KIB, 0), 32 * KIB);
	CHECK_FAILS(to(memory, file, 64 * KIB, 0), ENOSPC);
	CHECK(!fstat(memory, &status) && status.st_size == 32 * KIB);
	close(file), close(memory);
}

static void no_descriptors(void)
{
	int file = memory_of(PAGE), first = dup(file);
	struct rlimit old, small;
	int other[2], pair[2];
	char byte = 'x';
	pid_t child;

	about("EMFILE");
	(void)first;
	CHECK(!pipe(other) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK_EQUAL(write(pair[1], &byte, 1), 1);
	/* In a child, which begins without private pipes. */
	child = fork();
	if (!child) {
		CHECK(!getrlimit(RLIMIT_NOFILE, &old));
		small = (struct rlimit){(rlim_t)pair[1] + 1, old.rlim_max};
		while (dup(file) >= 0 && descriptors() < small.rlim_cur)
			;
		CHECK(!setrlimit(RLIMIT_NOFILE, &small));
		CHECK_FAILS(to(other[1], file, PAGE, 0), EMFILE);
		CHECK_FAILS(to(other[1], pair[0], 1, 0), EMFILE);
		CHECK_EQUAL(queued(pair[0]), 1);
		CHECK(!setrlimit(RLIMIT_NOFILE, &old));
		CHECK_EQUAL(to(other[1], file, PAGE, 0), PAGE);
		CHECK_EQUAL(to(other[1], pair[0], 1, 0), 1);
		_exit(0);
	}
	{
		int status;

		CHECK(waitpid(child, &status, 0) == child && !status);
	}
	close(file), close(first), close(other[0]), close(other[1]);
	close(pair[0]), close(pair[1]);
}

static void handler(int number)
{
	(void)number;
}

/* Bytes that the socket has for its reader, which are the pattern from its place `from` on. */
static size_t take_pattern(int reader, size_t from)
{
	static uint8_t bytes[64 * KIB];
	size_t taken = 0;
	ssize_t got, i;

	while ((got = recv(reader, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0) {
		for (i = 0; i < got; i++)
			CHECK_EQUAL(bytes[i], pattern(from + taken + (size_t)i));
		taken += (size_t)got;
	}
	return taken;
}

/* A socket that nobody reads is filled, len bytes at a time, and goes on once it is read. */
static void fill_socket(enum sink_kind kind, int buffer, size_t len)
{
	int file = memory_of(4 * MIB), full = 0;
	size_t sent = 0, taken = 0;
	struct sink sink;
	ssize_t done;

	about("NONBLOCK, socket %d that may wait, buffer of %d, %zu at a time", kind, buffer, len);
	CHECK(!sink_open(&sink, kind, 0));
	CHECK(!setsockopt(sink.fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)));
	CHECK(!(fcntl(sink.fd, F_GETFL) & O_NONBLOCK));
	while (full < 3) {
		done = to(sink.fd, file, len, RSPLICE_F_NONBLOCK);
		CHECK(done > 0 || errno == EAGAIN);
		if (done > 0) {
			sent += (size_t)done;
			continue;
		}
		full++;
		CHECK(sent > taken && sent < 4 * MIB);
		/* Packets of the loopback arrive in their own time. */
		while (taken < sent)
			taken += take_pattern(sink.reader, taken);
		CHECK_EQUAL(taken, sent);
	}
	CHECK_EQUAL(lseek(file, 0, SEEK_CUR), sent);
	sink_close(&sink);
	close(file);
}

static void socket_without_room(void)
{
	static const enum sink_kind kinds[] = {SINK_UNIX, SINK_TCP};
	static const int buffers[] = {1, 16384, 65536};
	static const size_t sizes[] = {100, PAGE, 256 * KIB};
	size_t i, j, k;

	for (i = 0; i < 2; i++)
		for (j = 0; j < 3; j++)
			for (k = 0; k < 3; k++)
				fill_socket(kinds[i], buffers[j], sizes[k]);
}

/* The same out of a pipe, whose pages go to the socket as they are; and a socket of messages. */
static void socket_without_room_for_a_pipe(void)
{
	int file = memory_of(MIB), other[2], pair[2], buffer = 4096;
	ssize_t done, sent = 0;

	about("NONBLOCK, a pipe into a socket that may wait");
	CHECK(!pipe2(other, O_CLOEXEC) && fcntl(other[1], F_SETPIPE_SZ, MIB) > 0);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(!setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)));
	CHECK_EQUAL(to(other[1], file, 512 * KIB, 0), 512 * KIB);
	while ((done = to(pair[1], other[0], 128 * KIB, RSPLICE_F_NONBLOCK)) > 0)
		sent += done;
	CHECK_EQUAL(errno, EAGAIN);
	CHECK(sent > 0);
	CHECK_EQUAL(queued(other[0]) + (int)rsplice_pending(other[0]) + sent, 512 * KIB);
	CHECK_EQUAL(take_pattern(pair[0], 0), sent);
	rsplice_discard(other[0]);
	close(pair[0]), close(pair[1]);

	about("NONBLOCK, a socket of messages that may wait");
	CHECK(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair));
	while (to(pair[1], file, PAGE, RSPLICE_F_NONBLOCK) > 0)
		;
	CHECK_EQUAL(errno, EAGAIN);
	close(file), close(other[0]), close(other[1]), close(pair[0]), close(pair[1]);
}

/* A signal ends the wait for a source, and for a consumer without SA_RESTART. */
static void interrupted(void)
{
	struct sigaction action = {.sa_handler = handler}, old;
	struct itimerval soon = {.it_value.tv_usec = 30000}, never = {0};
	int file = memory_of(4 * MIB), other[2], pair[2];
	ssize_t done;

	about("EINTR");
	CHECK(!pipe(other) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	CHECK(!sigaction(SIGALRM, &action, &old));
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_FAILS(to(ends[1], pair[0], 1, 0), EINTR);
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_FAILS(to(ends[1], other[0], 1, 0), EINTR);
	while (to(other[1], file, 64 * KIB, RSPLICE_F_NONBLOCK) > 0)
		;
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_FAILS(at(file, 511, other[1], -2, PAGE), EINTR);

	about("a signal while a socket takes only a part");
	setitimer(ITIMER_REAL, &soon, NULL);
	done = at(file, 0, pair[1], -2, 4 * MIB);
	CHECK(done > 0 && done < 4 * (ssize_t)MIB);
	CHECK(queued(pair[0]) == done);
	setitimer(ITIMER_REAL, &never, NULL);
	CHECK(!sigaction(SIGALRM, &old, NULL));
	close(file), close(other[0]), close(other[1]), close(pair[0]), close(pair[1]);
}

static void texts(void)
{
	int bit;

	about("texts");
	CHECK(!*rsplice_why(0));
	for (bit = 0; bit < 8; bit++)
		CHECK(*rsplice_why(1u << bit));
	CHECK(!*rsplice_why(1u << 8) && !*rsplice_why(1u << 31));
	CHECK(!strcmp(rsplice_why(0x50), rsplice_why(0x10)));
	CHECK(*rsplice_version());
}

int main(int argc, char **argv)
{
	unsigned int before;

	use_directory(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	CHECK(!pipe2(ends, O_CLOEXEC));
	before = descriptors();
	limit_seconds(30);
	bad_arguments();
	bad_kinds();
	would_wait();
	socket_without_room();
	socket_without_room_for_a_pipe();
	nobody_listens();
	strict();
	memory_refuses();
	too_large();
	no_space();
	no_descriptors();
	interrupted();
	texts();
	/* One private pipe and /dev/null at most. */
	about("descriptors");
	CHECK(descriptors() <= before + 3);
	return 0;
}
