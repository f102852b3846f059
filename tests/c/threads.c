/* SPDX-License-Identifier: MIT */
/* Eight threads on one source, on one consumer: every byte goes over once, and by one of them. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define THREADS 8
#define TOTAL	(6 * MIB + 4 * 700)
#define WORDS	(TOTAL / 4)

static int source, sink; /* sink: -1, and each thread has a pipe of its own */
static size_t at_a_time;
static atomic_uchar seen[WORDS];
static atomic_ulong taken;

/* The source is a row of numbers, in which each word tells where it is from. */
static void write_words(int fd)
{
	uint32_t *words = malloc(TOTAL), i;
	size_t done = 0;

	CHECK(words);
	for (i = 0; i < WORDS; i++)
		words[i] = i;
	while (done < TOTAL) {
		ssize_t part = write(fd, (char *)words + done, TOTAL - done);

		CHECK(part > 0);
		done += (size_t)part;
	}
	free(words);
}

static void mark(const uint32_t *words, size_t nr)
{
	size_t i;

	for (i = 0; i < nr; i++) {
		CHECK(words[i] < WORDS);
		CHECK_EQUAL(atomic_fetch_add(&seen[words[i]], 1), 0);
	}
}

static void read_back(int fd, size_t size, uint32_t *words)
{
	size_t have = 0;

	while (have < size) {
		ssize_t got = read(fd, (char *)words + have, size - have);

		CHECK(got > 0);
		have += (size_t)got;
	}
	mark(words, size / 4);
}

static void *take(void *unused)
{
	uint32_t *words = malloc(MIB);
	int ends[2];

	CHECK(words && !pipe2(ends, O_CLOEXEC) && fcntl(ends[1], F_SETPIPE_SZ, 64 * KIB) > 0);
	for (;;) {
		ssize_t done =
			rsplice(source, NULL, sink < 0 ? ends[1] : sink, NULL, at_a_time, 0, NULL);

		CHECK(done >= 0);
		if (!done)
			break;
		taken += (unsigned long)done;
		/* A part of a word would be split between two threads. */
		CHECK(!(done % 4));
		if (sink < 0)
			read_back(ends[0], (size_t)done, words);
	}
	close(ends[0]), close(ends[1]);
	free(words);
	return unused;
}

static void *feed(void *fd)
{
	write_words(*(int *)fd);
	close(*(int *)fd);
	return fd;
}

static void run(void)
{
	pthread_t threads[THREADS];
	int i;

	memset(seen, 0, sizeof(seen));
	taken = 0;
	for (i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, take, NULL));
	for (i = 0; i < THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL));
	CHECK_EQUAL(taken, TOTAL);
}

static void check_seen(void)
{
	size_t i;

	for (i = 0; i < WORDS; i++)
		CHECK_EQUAL(seen[i], 1);
}

static void from_file(int flags, size_t size)
{
	int fd = scratch_file(flags);
	char path[32];

	about("one file, %zu bytes at a time", size);
	{
		int plain;

		sprintf(path, "/proc/self/fd/%d", fd);
		plain = open(path, O_WRONLY);
		write_words(plain);
		close(plain);
	}
	source = fd;
	sink = -1;
	at_a_time = size;
	CHECK_EQUAL(lseek(fd, 0, SEEK_SET), 0);
	run();
	check_seen();
	CHECK_EQUAL(lseek(fd, 0, SEEK_CUR), TOTAL);

	about("one file into one memfd, both by their own positions, %zu at a time", size);
	CHECK_EQUAL(lseek(fd, 0, SEEK_SET), 0);
	sink = memfd_create("sink", MFD_CLOEXEC);
	run();
	{
		uint32_t *words = mmap(NULL, TOTAL, PROT_READ, MAP_SHARED, sink, 0);

		CHECK(words != MAP_FAILED);
		mark(words, WORDS);
		munmap(words, TOTAL);
	}
	check_seen();
	close(sink);
	close(fd);
}

static void from_queue(bool is_pipe, bool to_memory)
{
	pthread_t feeder;
	int ends[2];

	about("one %s, %s", is_pipe ? "pipe" : "socket", to_memory ? "one memfd" : "pipes");
	if (is_pipe)
		CHECK(!pipe2(ends, O_CLOEXEC));
	else
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	source = ends[0];
	sink = to_memory ? memfd_create("sink", MFD_CLOEXEC) : -1;
	at_a_time = 8 * KIB;
	CHECK(!pthread_create(&feeder, NULL, feed, &ends[1]));
	run();
	CHECK(!pthread_join(feeder, NULL));
	if (to_memory) {
		uint32_t *words = mmap(NULL, TOTAL, PROT_READ, MAP_SHARED, sink, 0);

		CHECK(words != MAP_FAILED);
		mark(words, WORDS);
		munmap(words, TOTAL);
		close(sink);
	}
	check_seen();
	CHECK_EQUAL(rsplice_pending(source), 0);
	close(source);
}

int main(int argc, char **argv)
{
	unsigned int before = descriptors();

	use_directory(argc, argv);
	limit_seconds(60);
	from_file(0, 32 * KIB);
	from_file(O_DIRECT, 64 * KIB);
	from_file(0, 20000); /* no multiple of a block */
	from_queue(false, false);
	from_queue(true, false);
	from_queue(false, true);
	from_queue(true, true);
	about("descriptors");
	CHECK(descriptors() <= before + 2 * 16 + 1 + 4); /* the pool, /dev/null, rings */
	return 0;
}
