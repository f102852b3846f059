// SPDX-License-Identifier: MIT
/*
 * Ways to fill memory from a file, timed: what rsplice() is compared with, and what it costs by
 * itself. Prints one JSON object a line: what, bytes, seconds, cpu_seconds, and for calls their
 * number.
 *
 * fill FILE WAY...   FILE: to be read, at least SIZE bytes long
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "../csrc/rsplice.h"

#define SIZE	   (256UL << 20)
#define CHUNK	   (1UL << 20)
#define HUGE	   (2UL << 20)
#define NR_CALLS   20000
#define NR_PIECES  2000
#define PIECE_SIZE 4096UL

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

struct source {
	int buffered;
	int direct;
};

static void fail(const char *what)
{
	fprintf(stderr, "fill: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double cpu(void)
{
	struct timespec time;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int new_memfd(unsigned int flags)
{
	int fd = memfd_create("fill", MFD_CLOEXEC | flags);

	if (fd < 0 || ftruncate(fd, (off_t)SIZE))
		fail("memfd");
	return fd;
}

static void by_read_and_write(const struct source *source, int memfd)
{
	char *buffer = malloc(CHUNK);
	size_t at;

	for (at = 0; at < SIZE; at += CHUNK) {
		if (pread(source->buffered, buffer, CHUNK, (off_t)at) != (ssize_t)CHUNK ||
		    pwrite(memfd, buffer, CHUNK, (off_t)at) != (ssize_t)CHUNK)
			fail("read and write");
	}
	free(buffer);
}

/* One copy: from the page cache of the file into the pages of the memfd. */
static void by_mapping(const struct source *source, int memfd)
{
	char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	size_t at;

	if (map == MAP_FAILED)
		fail("mmap");
	for (at = 0; at < SIZE; at += CHUNK) {
		if (pread(source->buffered, map + at, CHUNK, (off_t)at) != (ssize_t)CHUNK)
			fail("read into the mapping");
	}
	munmap(map, SIZE);
}

static void by_rsplice(const struct source *source, int memfd)
{
	int64_t from = 0, to = 0;
	struct rsplice_result result;

	while (to < (int64_t)SIZE) {
		if (rsplice(source->direct, &from, memfd, &to, SIZE - (size_t)to, RSPLICE_F_STRICT,
			    &result) <= 0)
			fail("rsplice");
	}
}

/* Makes huge pages of a memfd's, whatever /sys/kernel/mm/transparent_hugepage says. */
static void collapse(int memfd)
{
	char *map = mmap(NULL, SIZE + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *aligned = (char *)(((uintptr_t)map + HUGE - 1) / HUGE * HUGE);

	if (map == MAP_FAILED || mmap(aligned, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
				      memfd, 0) == MAP_FAILED)
		fail("mmap");
	memset(aligned, 0, SIZE);
	if (madvise(aligned, SIZE, MADV_COLLAPSE))
		fail("no huge pages for a memfd");
	munmap(map, SIZE + HUGE);
}

static bool fill(const struct source *source, const char *way)
{
	unsigned int flags = strcmp(way, "rsplice-hugetlb") ? 0 : MFD_HUGETLB | MFD_HUGE_2MB;
	int memfd = new_memfd(flags);
	double started, cpu_started;

	if (!strcmp(way, "rsplice-thp"))
		collapse(memfd);
	posix_fadvise(source->buffered, 0, 0, POSIX_FADV_DONTNEED);
	started = now();
	cpu_started = cpu();
	if (!strcmp(way, "read-write"))
		by_read_and_write(source, memfd);
	else if (!strcmp(way, "read-mapping"))
		by_mapping(source, memfd);
	else if (!strncmp(way, "rsplice", 7))
		by_rsplice(source, memfd);
	else
		return false;
	printf("{\"what\": \"%s\", \"bytes\": %lu, \"seconds\": %.6f, \"cpu_seconds\": %.6f}\n",
	       way, SIZE, now() - started, cpu() - cpu_started);
	close(memfd);
	return true;
}

/* Small pieces from all over the file: in turn, or as one batch. */
static void pieces(const struct source *source, const char *way)
{
	static struct rsplice_request requests[NR_PIECES];
	int memfd = new_memfd(0), good = 0;
	double started;
	size_t i;

	srand(1);
	for (i = 0; i < NR_PIECES; i++)
		requests[i] = (struct rsplice_request){
			.fd_in = source->direct,
			.fd_out = memfd,
			.off_in = (int64_t)((size_t)rand() % (SIZE / PIECE_SIZE) * PIECE_SIZE),
			.off_out = (int64_t)(i * PIECE_SIZE),
			.len = PIECE_SIZE};
	started = now();
	if (!strcmp(way, "pieces-batch"))
		good = rsplice_batch(requests, NR_PIECES, 0);
	for (i = 0; strcmp(way, "pieces-batch") && i < NR_PIECES; i++)
		good += rsplice(requests[i].fd_in, &requests[i].off_in, memfd, &requests[i].off_out,
				PIECE_SIZE, 0, NULL) == PIECE_SIZE;
	if (good != NR_PIECES)
		fail(way);
	printf("{\"what\": \"%s\", \"bytes\": %lu, \"seconds\": %.6f, \"calls\": %d}\n", way,
	       NR_PIECES * PIECE_SIZE, now() - started, NR_PIECES);
	close(memfd);
}

/* The least that a call does: from pipe to pipe, 1 byte there and back. */
static void calls(void)
{
	int one[2], two[2], i;
	double started;

	if (pipe(one) || pipe(two) || write(one[1], "x", 1) != 1)
		fail("pipe");
	started = now();
	for (i = 0; i < NR_CALLS; i++) {
		if (rsplice(one[0], NULL, two[1], NULL, 1, 0, NULL) != 1 ||
		    rsplice(two[0], NULL, one[1], NULL, 1, 0, NULL) != 1)
			fail("rsplice");
	}
	printf("{\"what\": \"calls\", \"bytes\": 0, \"seconds\": %.6f, \"calls\": %d}\n",
	       now() - started, 2 * NR_CALLS);
}

/* What memory permits: the time of one copy. */
static void copy_memory(void)
{
	char *from = malloc(SIZE), *to = malloc(SIZE);
	double started;

	memset(from, 1, SIZE);
	memset(to, 2, SIZE);
	started = now();
	memcpy(to, from, SIZE);
	/* The compiler must not see that nobody reads it. */
	__asm__ volatile("" : : "r"(to) : "memory");
	printf("{\"what\": \"memcpy\", \"bytes\": %lu, \"seconds\": %.6f}\n", SIZE,
	       now() - started);
	free(from);
	free(to);
}

int main(int argc, char **argv)
{
	struct source source;
	int i;

	if (argc < 3) {
		fprintf(stderr, "usage: fill FILE WAY...\n");
		return 2;
	}
	source.buffered = open(argv[1], O_RDONLY | O_CLOEXEC);
	source.direct = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (source.buffered < 0 || source.direct < 0)
		fail(argv[1]);
	for (i = 2; i < argc; i++) {
		if (!strcmp(argv[i], "calls"))
			calls();
		else if (!strcmp(argv[i], "memcpy"))
			copy_memory();
		else if (!strncmp(argv[i], "pieces-", 7))
			pieces(&source, argv[i]);
		else if (!fill(&source, argv[i]))
			fail(argv[i]);
	}
	return 0;
}
