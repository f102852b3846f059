/* SPDX-License-Identifier: MIT */
/* After success the bytes are the consumer's: what happens to the source later does not show. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Writes over the whole source, in the page cache, on the disk, and through a mapping. */
static void change(int fd, size_t size)
{
	char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	char other[512];
	size_t at;

	CHECK(bytes != MAP_FAILED);
	memset(bytes, 'm', size);
	munmap(bytes, size);
	memset(other, 'w', sizeof(other));
	for (at = 0; at < size; at += 2 * sizeof(other))
		CHECK(pwrite(fd, other, sizeof(other), (off_t)at) == sizeof(other));
	CHECK(!fsync(fd) || errno == EINVAL);
	CHECK(!ftruncate(fd, 1));
}

static int source_of(enum origin_kind kind, size_t size)
{
	uint8_t *bytes;
	size_t i;
	int fd;

	if (kind == ORIGIN_TMPFS)
		return memory_of(size);
	fd = scratch_file(0);
	bytes = malloc(size);
	CHECK(bytes);
	for (i = 0; i < size; i++)
		bytes[i] = pattern(i);
	CHECK_EQUAL(write(fd, bytes, size), size);
	free(bytes);
	CHECK(!lseek(fd, 0, SEEK_SET));
	return fd;
}

static void try_changing(enum origin_kind kind, enum sink_kind consumer, size_t from)
{
	static uint8_t bytes[MIB];
	size_t size = 9 * PAGE, left = size - from, i;
	int fd = source_of(kind, size);
	int64_t in = (int64_t)from;
	struct sink sink;

	about("a %s that changes, from %zu, in a %s", kind == ORIGIN_TMPFS ? "tmpfs file" : "file",
	      from, sink_names[consumer]);
	CHECK(!sink_open(&sink, consumer, 0));
	CHECK_EQUAL(rsplice(fd, &in, sink.fd, NULL, left, 0, NULL), left);
	change(fd, size);
	sink_take(&sink, bytes, left);
	for (i = 0; i < left; i++)
		CHECK_EQUAL(bytes[i], pattern(from + i));
	sink_close(&sink);
	close(fd);
}

/* With SHARE it does show: so this test can see what it looks for. */
static void try_sharing(void)
{
	int fd = source_of(ORIGIN_TMPFS, PAGE);
	struct sink sink;
	uint8_t bytes[PAGE];

	about("a tmpfs file that is shared");
	CHECK(!sink_open(&sink, SINK_PIPE, 0));
	CHECK_EQUAL(rsplice(fd, NULL, sink.fd, NULL, PAGE, RSPLICE_F_SHARE, NULL), PAGE);
	CHECK_EQUAL(pwrite(fd, "changed", 7, 0), 7);
	sink_take(&sink, bytes, PAGE);
	CHECK(!memcmp(bytes, "changed", 7));
	sink_close(&sink);
	close(fd);
}

int main(int argc, char **argv)
{
	static const enum sink_kind sinks[] = {SINK_PIPE, SINK_MEMFD, SINK_UNIX, SINK_TCP};
	size_t i;

	use_directory(argc, argv);
	limit_seconds(30);
	for (i = 0; i < sizeof(sinks) / sizeof(sinks[0]); i++) {
		try_changing(ORIGIN_BUFFERED, sinks[i], 0);
		try_changing(ORIGIN_BUFFERED, sinks[i], 700);
		try_changing(ORIGIN_TMPFS, sinks[i], 0);
		try_changing(ORIGIN_TMPFS, sinks[i], 700);
	}
	try_sharing();
	return 0;
}
