/* SPDX-License-Identifier: MIT */
/*
 * libFuzzer over sources, consumers, sizes, offsets, flags and fault positions: each input is a
 * few calls, checked from both ends as in transfer.c. Scratch files go to $TMPDIR.
 */
#define _GNU_SOURCE
#include "check.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
	const uint8_t *data;
	size_t left;
};

/* 0 where the input has ended. */
static unsigned int take(struct input *input, unsigned int below)
{
	unsigned int value = 0;

	if (input->left) {
		value = *input->data++;
		input->left--;
	}
	return value % below;
}

/* Mostly near the ends of blocks and pages. */
static size_t take_place(struct input *input)
{
	static const size_t places[] = {0, 1, 512, PAGE, 2 * PAGE, 3 * PAGE, 16 * PAGE, 60 * KIB};
	size_t place = places[take(input, 8)];
	unsigned int beside = take(input, 16);

	return beside < 12 ? place + (beside % 3 ? beside % 3 - (place ? 1 : 0) : 0)
			   : place + take(input, 256) * 13;
}

static bool may_fail(const struct transfer *transfer, int error)
{
	if (error == EAGAIN && transfer->flags & RSPLICE_F_NONBLOCK)
		return true;
	if (error == EOPNOTSUPP && transfer->flags & RSPLICE_F_STRICT)
		return true;
	return shim_struck();
}

static bool persists;

static bool may_lose(const struct transfer *transfer)
{
	return shim_struck() && (persists || (transfer->sink_kind == SINK_FUSE &&
					      shim_victim_fd() == transfer->sink.fd));
}

static struct fault take_fault(struct input *input, const struct transfer *transfer)
{
	static const int errors[] = {EINTR, EAGAIN, ENOMEM, EIO, EPIPE, ENOSPC, EMFILE, EINVAL};
	struct fault fault = {.kind = (enum fault_kind)take(input, FAULT_EVENT)};

	fault.at = 1 + take(input, 64);
	fault.error = errors[take(input, 8)];
	fault.persists = !take(input, 8) && fault.error != EINTR;
	if (transfer->origin_kind == ORIGIN_DGRAM)
		fault.persists = false; /* nobody tells how much of it is lost */
	return fault;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	const char *scratch = getenv("TMPDIR");
	char *arguments[] = {(*argv)[0], (char *)(scratch ? scratch : "/tmp")};

	(void)argc;
	use_directory(2, arguments);
	setenv("CHECK_ABORT", "1", 1);
	signal(SIGPIPE, SIG_IGN);
	around_calls = shim_around;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const size_t sizes[] = {
		0, 1, 511, 512, PAGE, 513, 2 * PAGE, 5 * PAGE + 100, 60 * KIB, 2 * MIB + 100};
	struct input input = {data, size};
	struct transfer transfer = {.may_fail = may_fail, .may_lose = may_lose};
	unsigned int calls;
	struct fault fault;

	transfer.origin_kind = (enum origin_kind)take(&input, NR_ORIGINS);
	transfer.sink_kind = (enum sink_kind)take(&input, NR_SINKS);
	transfer.size = sizes[take(&input, 10)];
	transfer.from = take_place(&input);
	transfer.start = take_place(&input);
	transfer.len = take_place(&input);
	transfer.positions = take(&input, 2);
	transfer.flags = RSPLICE_F_NONBLOCK; /* nobody else is there to wait for */
	transfer.flags |= take(&input, 4) ? 0 : RSPLICE_F_STRICT;
	if (transfer.sink_kind != SINK_FUSE)
		transfer.flags |= take(&input, 4) ? 0 : RSPLICE_F_SHARE;
	else if (!(transfer.flags & RSPLICE_F_STRICT))
		transfer.flags |= take(&input, 4) ? 0 : RSPLICE_F_READAHEAD;
	/* A cut message is the end of what the next one can be compared with. */
	if (transfer.origin_kind == ORIGIN_DGRAM && transfer.len < MESSAGE)
		transfer.len += MESSAGE;
	if (transfer.origin_kind == ORIGIN_BLOCK)
		transfer.origin_kind = ORIGIN_BUFFERED; /* loop devices are few */
	fault = take_fault(&input, &transfer);
	persists = fault.persists;
	calls = 1 + take(&input, 6);
	about("%s, fault %d at %lu", transfer_name(&transfer), (int)fault.kind, fault.at);
	if (transfer_begin(&transfer))
		return 0;
	/* Byte by byte a few KiB fill a socket that nobody reads: it is not waited for either way.
	 */
	if ((transfer.sink_kind == SINK_UNIX || transfer.sink_kind == SINK_TCP) && take(&input, 2))
		CHECK(!fcntl(transfer.sink.fd, F_SETFL, O_NONBLOCK));
	transfer.sink.loose = fault.persists || fault.kind != FAULT_NONE;
	shim_spare(transfer.origin_kind == ORIGIN_DGRAM ? transfer.origin.fd : -1,
		   transfer.sink_kind == SINK_FUSE ? transfer.sink.fd : -1);
	shim_arm(&fault);
	while (calls--)
		transfer_step(&transfer);
	shim_disarm();
	transfer_end(&transfer);
	return 0;
}
