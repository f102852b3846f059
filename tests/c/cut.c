/* SPDX-License-Identifier: MIT */
/*
 * The source is cut short, or grows, before each of the system calls of a call: what is returned
 * is a beginning of what the file had, and nothing else arrives.
 */
#define _GNU_SOURCE
#include "check.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE (6 * PAGE + 100)

static int writer;
static off_t new_size;

static void change(void)
{
	uint8_t byte;
	off_t at = SIZE;

	CHECK(new_size >= SIZE || !ftruncate(writer, new_size));
	for (; at < new_size; at++) {
		byte = pattern((size_t)at);
		CHECK_EQUAL(pwrite(writer, &byte, 1, at), 1);
	}
}

static int make_file(int flags)
{
	uint8_t bytes[SIZE];
	char path[32];
	int fd;
	size_t i;

	writer = scratch_file(0);
	for (i = 0; i < SIZE; i++)
		bytes[i] = pattern(i);
	CHECK_EQUAL(write(writer, bytes, SIZE), SIZE);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", writer);
	fd = open(path, O_RDONLY | O_CLOEXEC | flags);
	CHECK(fd >= 0);
	return fd;
}

/* Whether the change was met. */
static bool run(int flags, enum sink_kind kind, int64_t from, unsigned long at)
{
	struct fault fault = {.kind = FAULT_EVENT, .at = at};
	struct rsplice_result result;
	static uint8_t bytes[2 * SIZE];
	int fd = make_file(flags);
	int64_t offset = from;
	struct sink sink;
	ssize_t done;
	size_t i;
	bool met;

	CHECK(!sink_open(&sink, kind, 0));
	shim_arm(&fault);
	shim_enter();
	done = kind == SINK_FUSE ? rsplice_fuse_reply(sink.fd, 23, fd, &offset, SIZE, 0, &result)
				 : rsplice(fd, &offset, sink.fd, NULL, SIZE, 0, &result);
	shim_leave();
	met = shim_struck();
	about("%s, file cut to %lld at call %lu (%s), into a %s", flags ? "O_DIRECT" : "buffered",
	      (long long)new_size, at, shim_victim(), sink_names[kind]);
	shim_disarm();
	CHECK(done >= 0);
	/* Whatever was cut off, the beginning was there all the time. */
	CHECK(done + from >= (new_size < SIZE ? new_size : SIZE) || from >= new_size);
	CHECK_EQUAL(result.moved + result.shared + result.direct + result.copied + result.unknown,
		    done);
	sink_take(&sink, bytes, (size_t)done);
	for (i = 0; i < (size_t)done; i++)
		CHECK_EQUAL(bytes[i], pattern((size_t)from + i));
	sink_close(&sink);
	close(fd);
	close(writer);
	return met;
}

int main(int argc, char **argv)
{
	static const off_t sizes[] = {0, 700, 2 * PAGE, 4 * PAGE + 700, SIZE + 3 * PAGE};
	static const enum sink_kind sinks[] = {SINK_PIPE, SINK_MEMFD, SINK_UNIX, SINK_FUSE};
	static const int64_t begins[] = {0, 511};
	unsigned long at, tried = 0;
	size_t i;

	use_directory(argc, argv);
	limit_seconds(60);
	shim_event(change);
	for (i = 0; i < 5 * 4 * 2 * 2; i++) {
		new_size = sizes[i % 5];
		for (at = 1; run(i / 20 % 2 ? O_DIRECT : 0, sinks[i / 5 % 4], begins[i / 40], at);
		     at++)
			tried++;
	}
	printf("%lu changes\n", tried);
	return 0;
}
