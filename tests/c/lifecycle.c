/* SPDX-License-Identifier: MIT */
/*
 * Behaves as a library with the probes of csrc/probes.h must not, a known number of times, and in
 * its other modes as it must.
 *
 *   lifecycle MODE COUNT
 */
#define _GNU_SOURCE
#include "probes.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE  4096
#define SHORT 1001 /* bytes */

static int count;

static void require(int condition, const char *what)
{
	if (condition)
		return;
	perror(what);
	exit(1);
}

/* Calls that end in a publish, in an abort, or not at all. */
static void leak(void)
{
	int64_t i;

	for (i = 1; i <= count; i++)
		rsplice_probe_reserve(i, 0, 1, 2 * PAGE);
}

static void publish_all(void)
{
	int64_t i;

	for (i = 1; i <= count; i++) {
		rsplice_probe_reserve(i, 0, 1, 2 * PAGE);
		rsplice_probe_publish(i, PAGE, 0, 0, 0, 0);
	}
}

static void abort_all(void)
{
	int64_t i;

	for (i = 1; i <= count; i++) {
		rsplice_probe_reserve(i, 0, 1, 2 * PAGE);
		rsplice_probe_abort(i, 2 * PAGE);
	}
}

static void *leak_in_thread(void *unused)
{
	leak();
	return unused;
}

static void leak_in_threads(void)
{
	pthread_t thread;
	int i, threads = 3;

	for (i = 0; i < threads; i++) {
		require(!pthread_create(&thread, NULL, leak_in_thread, NULL), "pthread_create");
		require(!pthread_join(thread, NULL), "pthread_join");
	}
}

static void leak_and_be_killed(void)
{
	leak();
	raise(SIGKILL);
}

static void *wait_in_call(void *barrier)
{
	leak();
	pthread_barrier_wait(barrier);
	for (;;)
		pause();
	return NULL;
}

/* The process exits while another thread is within its calls. */
static void interrupt(void)
{
	pthread_barrier_t barrier;
	pthread_t thread;

	require(!pthread_barrier_init(&barrier, NULL, 2), "pthread_barrier_init");
	require(!pthread_create(&thread, NULL, wait_in_call, &barrier), "pthread_create");
	pthread_barrier_wait(&barrier);
	exit(0);
}

static void end(int number)
{
	(void)number;
	_exit(0);
}

/* A signal's handler ends the process while it is within its calls. */
static void handle(void)
{
	signal(SIGTERM, end);
	leak();
	raise(SIGTERM);
}

/*
 * Gifts that are spliced onwards for a move, mapped still or not, in a call or not; of the call's
 * own making or not.
 */
static void give(int mapped, int in_call, int own)
{
	int first[2], second[2];
	char page[PAGE];
	int64_t i;

	require(!pipe(first) && !pipe(second), "pipe");
	for (i = 1; i <= count; i++) {
		char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				    -1, 0);
		struct iovec vector = {memory, PAGE};

		require(memory != MAP_FAILED, "mmap");
		memset(memory, 'g', PAGE);
		if (in_call)
			rsplice_probe_reserve(i, first[0], second[1], PAGE);
		require(vmsplice(first[1], &vector, 1, SPLICE_F_GIFT) == PAGE, "vmsplice");
		if (in_call)
			rsplice_probe_fill(i, PAGE, own ? RSPLICE_HOW_COPY : RSPLICE_HOW_REFERENCE);
		if (!mapped)
			munmap(memory, PAGE);
		require(splice(first[0], NULL, second[1], NULL, PAGE, SPLICE_F_MOVE) == PAGE,
			"splice");
		if (in_call)
			rsplice_probe_publish(i, PAGE, 0, 0, 0, 0);
		if (mapped)
			munmap(memory, PAGE);
		require(read(second[0], page, PAGE) == PAGE, "read");
	}
}

/*
 * Calls that each fill SHORT bytes of a file in memory, behind which something is left in the page:
 * by the call, by somebody else before it, or by nobody.
 */
static void fill(int in_call, int left)
{
	int64_t i;

	for (i = 1; i <= count; i++) {
		int fd = memfd_create("short", 0);
		char *page;

		require(fd >= 0, "memfd_create");
		if (in_call)
			rsplice_probe_reserve(i, 0, fd, PAGE);
		require(!ftruncate(fd, SHORT), "ftruncate");
		page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		require(page != MAP_FAILED, "mmap");
		memset(page, 'f', SHORT);
		if (left)
			page[SHORT + i * 131 % (PAGE - SHORT)] = 'l';
		if (!in_call)
			rsplice_probe_reserve(i, 0, fd, PAGE);
		rsplice_probe_publish(i, SHORT, 0, 0, 0, 0);
		munmap(page, PAGE);
		close(fd);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc == 3 ? argv[1] : "";

	count = argc == 3 ? atoi(argv[2]) : 0;
	if (!strcmp(mode, "leak"))
		leak();
	else if (!strcmp(mode, "publish"))
		publish_all();
	else if (!strcmp(mode, "abort"))
		abort_all();
	else if (!strcmp(mode, "leak-in-threads"))
		leak_in_threads();
	else if (!strcmp(mode, "killed"))
		leak_and_be_killed();
	else if (!strcmp(mode, "interrupted"))
		interrupt();
	else if (!strcmp(mode, "mapped"))
		give(1, 1, 1);
	else if (!strcmp(mode, "unmapped"))
		give(0, 1, 1);
	else if (!strcmp(mode, "mapped-outside"))
		give(1, 0, 0);
	else if (!strcmp(mode, "mapped-by-others"))
		give(1, 1, 0);
	else if (!strcmp(mode, "handled"))
		handle();
	else if (!strcmp(mode, "stale"))
		fill(1, 1);
	else if (!strcmp(mode, "clean"))
		fill(1, 0);
	else if (!strcmp(mode, "stale-before"))
		fill(0, 1);
	else
		return 2;
	return 0;
}
