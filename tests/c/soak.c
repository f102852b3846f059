/* SPDX-License-Identifier: MIT */
/*
 * Ten thousand rounds of good and bad calls: neither descriptors nor pages are left behind.
 *
 *   soak DIRECTORY [ROUNDS]
 */
#define _GNU_SOURCE
#include "check.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t state = 23;

/* The same rounds every time. */
static uint32_t draw(uint32_t below)
{
	state = state * 1664525u + 1013904223u;
	return (state >> 8) % below;
}

static bool may_fail(const struct transfer *transfer, int error)
{
	(void)transfer, (void)error;
	return true;
}

static bool may_lose(const struct transfer *transfer)
{
	return shim_struck() && transfer->sink_kind == SINK_FUSE;
}

static void round_of_calls(void)
{
	static const int errors[] = {EINTR, EAGAIN, ENOMEM, EIO, EPIPE, ENOSPC};
	static const enum origin_kind origins[] = {ORIGIN_DIRECT, ORIGIN_BUFFERED, ORIGIN_TMPFS,
						   ORIGIN_ZERO,	  ORIGIN_UNIX,	   ORIGIN_PIPE,
						   ORIGIN_TCP};
	static const enum sink_kind sinks[] = {SINK_PIPE, SINK_TINY, SINK_MEMFD, SINK_UNIX,
					       SINK_FUSE};
	struct fault fault = {.kind = draw(2) ? FAULT_NONE : FAULT_ERROR,
			      .at = 1 + draw(20),
			      .persists = !draw(8),
			      .error = errors[draw(6)]};
	struct transfer transfer = {.origin_kind = origins[draw(7)],
				    .sink_kind = sinks[draw(5)],
				    .size = 3 * PAGE + 100,
				    .from = draw(2) ? draw(3 * PAGE) : 0,
				    .len = 1 + draw(3 * PAGE),
				    .flags = RSPLICE_F_NONBLOCK,
				    .may_fail = may_fail,
				    .may_lose = may_lose};
	unsigned int calls = 1 + draw(3);

	/* What is wrong beyond a fault: STRICT where it cannot be. */
	if (!draw(4))
		transfer.flags |= RSPLICE_F_STRICT;
	else if (!draw(2) && transfer.sink_kind == SINK_FUSE)
		transfer.flags |= RSPLICE_F_READAHEAD;
	if (!draw(4) && transfer.sink_kind != SINK_FUSE)
		transfer.flags |= RSPLICE_F_SHARE;
	/* What cannot be read again may be lost to these, and no kernel interrupts for ever. */
	fault.persists =
		fault.persists && transfer.origin_kind < ORIGIN_TCP && fault.error != EINTR;
	about("%s, fault at %lu: %s", transfer_name(&transfer), fault.at, strerror(fault.error));
	CHECK(!transfer_begin(&transfer));
	transfer.sink.loose = fault.persists;
	shim_arm(&fault);
	/* It is left in the middle, with bytes in the socket and bytes carried over. */
	while (calls--)
		transfer_step(&transfer);
	shim_disarm();
	transfer_end(&transfer);
}

struct memory {
	long available; /* KiB, as /proc/meminfo has it */
	long shmem;
};

static struct memory memory_now(void)
{
	struct memory now = {0, 0};
	char line[128];
	FILE *file = fopen("/proc/meminfo", "re");

	CHECK(file);
	while (fgets(line, sizeof(line), file)) {
		sscanf(line, "MemAvailable: %ld", &now.available);
		sscanf(line, "Shmem: %ld", &now.shmem);
	}
	fclose(file);
	return now;
}

/* Of this process alone; /proc/meminfo is everybody's. */
static long resident(void)
{
	long total, pages;
	FILE *file = fopen("/proc/self/statm", "re");

	CHECK(file && fscanf(file, "%ld %ld", &total, &pages) == 2);
	fclose(file);
	return pages;
}

/* Whether the machine had as much memory after the rounds as before. */
static bool keeps_memory(unsigned long rounds)
{
	struct memory before = memory_now(), after;
	unsigned long i;

	for (i = 0; i < rounds; i++)
		round_of_calls();
	after = memory_now();
	printf("%lu rounds: %ld KiB less available, %ld KiB more shared memory\n", rounds,
	       before.available - after.available, after.shmem - before.shmem);
	/* A page a round. */
	return before.available - after.available < (long)rounds * 4 &&
	       after.shmem - before.shmem < (long)rounds * 4;
}

int main(int argc, char **argv)
{
	unsigned long rounds = 10000, i;
	unsigned int open_before, tries = 0;
	long pages;

	use_directory(argc, argv);
	if (argc > 2)
		rounds = strtoul(argv[2], NULL, 10);
	signal(SIGPIPE, SIG_IGN);
	limit_seconds(110);
	around_calls = shim_around;
	for (i = 0; i < rounds / 10 + 200; i++)
		round_of_calls();
	open_before = descriptors();
	pages = resident();
	/* Others use memory too; but what leaks does so every time. */
	while (!keeps_memory(rounds)) {
		about("memory, after %lu rounds", rounds);
		CHECK(rounds < 1000 || ++tries < 4);
		if (rounds < 1000)
			break; /* too few to tell it from what others do */
	}
	about("after %lu rounds", rounds);
	CHECK(descriptors() <= open_before + 2);
	CHECK(resident() - pages < (long)rounds / 8 + 256);
	return 0;
}
