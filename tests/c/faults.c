/* SPDX-License-Identifier: MIT */
/*
 * Every call that the library makes of the kernel fails once, at every position, with every errno
 * and with short counts: the count returned is exact, so is the content, what was not returned is
 * still to be had, no descriptor is left, and the next call works.
 *
 *   faults DIRECTORY [EVERY]    only every EVERYth position
 */
#include "check.h"
#include "shim.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long tried;
static unsigned long every = 1;
static struct fault fault;

/* What a call reports is what struck it, or the end of what may be waited for. */
static bool may_fail(const struct transfer *transfer, int error)
{
	if (transfer->flags & RSPLICE_F_NONBLOCK && error == EAGAIN)
		return true;
	if (!shim_struck())
		return false;
	/* What the consumer is cannot be told without fstatfs(2). */
	return fault.kind != FAULT_ERROR || error == fault.error || error == EIO ||
	       error == EBADF ||
	       (error == EOPNOTSUPP && (fault.persists || !strcmp(shim_victim(), "fstatfs")));
}

static bool may_lose(const struct transfer *transfer)
{
	/* rsplice(3): the kernel keeps the pages of a FUSE reply that it refuses. */
	return transfer->sink_kind == SINK_FUSE && shim_struck() &&
	       shim_victim_fd() == transfer->sink.fd;
}

/* Nobody promises that bytes outlive a kernel that refuses everything for ever. */
static bool may_lose_all(const struct transfer *transfer)
{
	(void)transfer;
	return shim_struck();
}

static void say_what(const struct transfer *transfer)
{
	static const char *const kinds[] = {"nothing", "error", "one byte", "half"};

	about("%s: %s %s at %lu%s: %s", transfer_name(transfer), kinds[fault.kind],
	      fault.kind == FAULT_ERROR ? strerror(fault.error) : "", fault.at,
	      fault.persists ? " and on" : "", shim_victim());
}

/* While everything fails: nothing hangs, and nothing wrong arrives. */
static void endure(struct transfer *transfer)
{
	unsigned int i;

	for (i = 0; i < 20 && transfer->at < transfer->size; i++) {
		say_what(transfer);
		transfer_step(transfer);
	}
}

/* Whether the fault was met. */
static bool run(struct transfer transfer)
{
	unsigned int calls = 0;
	unsigned long met;

	CHECK(!transfer_begin(&transfer));
	transfer.sink.loose = fault.persists && fault.kind == FAULT_ERROR;
	shim_spare(transfer.origin_kind == ORIGIN_DGRAM ? transfer.origin.fd : -1,
		   transfer.sink_kind == SINK_FUSE ? transfer.sink.fd : -1);
	shim_arm(&fault);
	if (fault.persists)
		endure(&transfer);
	while (!fault.persists && transfer.at < transfer.origin.size) {
		say_what(&transfer);
		CHECK(calls++ < 1000);
		transfer_step(&transfer);
	}
	met = shim_struck();
	shim_disarm();
	say_what(&transfer);
	transfer_finish(&transfer);
	transfer_end(&transfer);
	tried++;
	return met;
}

static void run_clean(struct transfer transfer)
{
	const struct fault none = {.kind = FAULT_NONE};

	shim_arm(&none);
	about("clean: %s", transfer_name(&transfer));
	CHECK(!transfer_begin(&transfer));
	transfer.may_fail = NULL;
	transfer_finish(&transfer);
	transfer_end(&transfer);
}

static void run_positions(const struct transfer *transfer, struct fault kind)
{
	unsigned int before = descriptors();
	bool met = true;

	fault = kind;
	for (fault.at = 1; met; fault.at += every) {
		met = run(*transfer);
		say_what(transfer);
		CHECK(descriptors() <= before);
		if (fault.at % 8 == 1)
			run_clean(*transfer);
		CHECK(fault.at < 10000);
	}
}

static void run_faults(struct transfer transfer)
{
	static const int errors[] = {EINTR, EAGAIN, ENOMEM, EIO, EPIPE, ENOSPC, EMFILE};
	size_t i;

	transfer.may_fail = may_fail;
	transfer.may_lose = may_lose;
	run_clean(transfer); /* private pipes are there from now on */
	for (i = 0; i < sizeof(errors) / sizeof(errors[0]); i++)
		run_positions(&transfer, (struct fault){.kind = FAULT_ERROR, .error = errors[i]});
	run_positions(&transfer, (struct fault){.kind = FAULT_ONE});
	run_positions(&transfer, (struct fault){.kind = FAULT_HALF});
	run_positions(&transfer, (struct fault){.kind = FAULT_HALF, .persists = true});
	if (transfer.origin_kind == ORIGIN_DGRAM)
		return; /* nobody tells how much of it is lost */
	transfer.may_lose = may_lose_all;
	run_positions(&transfer,
		      (struct fault){.kind = FAULT_ERROR, .error = ENOMEM, .persists = true});
	run_positions(&transfer,
		      (struct fault){.kind = FAULT_ERROR, .error = EAGAIN, .persists = true});
}

static void run_pair(enum origin_kind origin, enum sink_kind sink)
{
	struct transfer transfer = {
		.origin_kind = origin, .sink_kind = sink, .size = 2 * PAGE + 100, .len = 3 * PAGE};

	if (origin == ORIGIN_DGRAM) /* whose end nobody tells */
		transfer.flags = RSPLICE_F_NONBLOCK;
	run_faults(transfer);
	if (origin == ORIGIN_DIRECT || origin == ORIGIN_BUFFERED) {
		transfer.from = 511;
		transfer.positions = sink != SINK_FUSE;
		run_faults(transfer);
	}
	if (origin == ORIGIN_DIRECT && sink == SINK_FUSE) {
		transfer.from = 0;
		transfer.flags = RSPLICE_F_READAHEAD;
		run_faults(transfer);
	}
	if (origin == ORIGIN_UNIX || origin == ORIGIN_TMPFS) {
		transfer.flags |= RSPLICE_F_SHARE;
		run_faults(transfer);
	}
}

int main(int argc, char **argv)
{
	static const enum origin_kind origins[] = {ORIGIN_DIRECT, ORIGIN_BUFFERED, ORIGIN_TMPFS,
						   ORIGIN_ZERO,	  ORIGIN_UNIX,	   ORIGIN_DGRAM,
						   ORIGIN_PIPE};
	static const enum sink_kind sinks[] = {SINK_PIPE, SINK_MEMFD, SINK_UNIX, SINK_FUSE};
	size_t i, j;

	use_directory(argc, argv);
	if (argc > 2)
		every = strtoul(argv[2], NULL, 10);
	limit_seconds(110);
	around_calls = shim_around;
	for (i = 0; i < sizeof(origins) / sizeof(origins[0]); i++) {
		for (j = 0; j < sizeof(sinks) / sizeof(sinks[0]); j++)
			run_pair(origins[i], sinks[j]);
	}
	/* Several reads at a time, through io_uring. */
	run_faults((struct transfer){.origin_kind = ORIGIN_DIRECT,
				     .sink_kind = SINK_MEMFD,
				     .size = 3 * MIB,
				     .len = 3 * MIB});
	printf("%lu faults\n", tried);
	return 0;
}
