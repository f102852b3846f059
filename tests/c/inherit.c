/* SPDX-License-Identifier: MIT */
/* What a child gets: after fork(2) nothing that is pooled or carried over, after exec nothing. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char *self;

/* In the exec'd image: 0, 1 and 2 alone. */
static void check_clean(void)
{
	about("descriptors after exec");
	CHECK_EQUAL(descriptors(), 3);
}

static void end_child(pid_t child)
{
	int status;

	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
}

static void exec_clean(void)
{
	pid_t child = fork();

	if (!child) {
		execl(self, self, "clean", (char *)NULL);
		_exit(1);
	}
	end_child(child);
	/* Without fork's handlers: O_CLOEXEC alone. */
	child = vfork();
	if (!child) {
		execl(self, self, "clean", (char *)NULL);
		_exit(1);
	}
	end_child(child);
}

int main(int argc, char **argv)
{
	int pair[2], out[2], memory, disk, file = -1;
	unsigned int open_before, open_after;
	char bytes[64];
	int64_t offset = 511;
	pid_t child;

	self = argv[0];
	if (argc > 1 && !strcmp(argv[1], "clean")) {
		check_clean();
		return 0;
	}
	use_directory(argc, argv);
	limit_seconds(30);
	/* What the test was started with is not of the library. */
	for (memory = 3; memory < 256; memory++)
		close(memory);
	open_before = descriptors();

	about("fork with bytes carried over");
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(!pipe2(out, O_CLOEXEC | O_NONBLOCK) && fcntl(out[1], F_SETPIPE_SZ, PAGE) == PAGE);
	CHECK_EQUAL(write(out[1], "x", 1), 1);
	CHECK_EQUAL(write(pair[1], "carried", 7), 7);
	CHECK_FAILS(rsplice(pair[0], NULL, out[1], NULL, 64, 0, NULL), EAGAIN);
	CHECK_EQUAL(rsplice_pending(pair[0]), 7);
	/* And pooled pipes, /dev/null, rings. */
	disk = scratch_file(0);
	CHECK(!ftruncate(disk, 4 * MIB));
	file = memfd_create("big", MFD_CLOEXEC);
	CHECK_EQUAL(rsplice(disk, NULL, file, NULL, 4 * MIB, 0, NULL), 4 * MIB);
	CHECK_EQUAL(read(out[0], bytes, 1), 1);
	CHECK_EQUAL(rsplice(disk, &offset, out[1], NULL, 1000, 0, NULL), 1000);
	CHECK_EQUAL(read(out[0], bytes, sizeof(bytes)), sizeof(bytes));
	while (read(out[0], bytes, sizeof(bytes)) > 0)
		;
	open_after = descriptors();
	CHECK(open_after > open_before + 6);

	child = fork();
	if (!child) {
		about("in the child");
		CHECK_EQUAL(rsplice_pending(pair[0]), 0);
		/* The test's own: two pairs, two files; at most /dev/null is the library's. */
		CHECK(descriptors() <= open_before + 6 + 1);
		CHECK_EQUAL(write(pair[1], "new", 3), 3);
		CHECK_EQUAL(rsplice(pair[0], NULL, out[1], NULL, 64, 0, NULL), 3);
		CHECK_EQUAL(read(out[0], bytes, sizeof(bytes)), 3);
		CHECK(!memcmp(bytes, "new", 3));
		exec_clean();
		_exit(0);
	}
	end_child(child);
	about("in the parent, after the child");
	CHECK_EQUAL(rsplice_pending(pair[0]), 7);
	exec_clean();
	CHECK_EQUAL(rsplice(pair[0], NULL, out[1], NULL, 64, 0, NULL), 7);
	CHECK_EQUAL(read(out[0], bytes, sizeof(bytes)), 7);
	CHECK(!memcmp(bytes, "carried", 7));
	CHECK_EQUAL(descriptors(), open_after);
	return 0;
}
