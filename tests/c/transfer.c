/* SPDX-License-Identifier: MIT */
/* Every source to every consumer, with every flag: the bytes, the counts and what became of them.
 */
#include "check.h"

#include <errno.h>
#include <stdio.h>

static unsigned int tried;
/* Why a source or a consumer cannot be tried, each told once. */
static const char *lacking[NR_ORIGINS + NR_SINKS];

static bool in_memory(enum sink_kind kind)
{
	return kind == SINK_MEMFD || kind == SINK_TMPFS || kind == SINK_HUGE;
}

static bool is_file(enum origin_kind kind)
{
	return kind == ORIGIN_DIRECT || kind == ORIGIN_BUFFERED || kind == ORIGIN_BLOCK;
}

/* The table of rsplice(3), "What becomes of the bytes". */
static void check_dispositions(const struct transfer *transfer)
{
	const struct rsplice_result *total = &transfer->total;
	uint64_t taken = transfer->sink.taken;
	bool memory = in_memory(transfer->sink_kind), fuse = transfer->sink_kind == SINK_FUSE;

	switch (transfer->origin_kind) {
	case ORIGIN_DIRECT:
	case ORIGIN_BUFFERED:
	case ORIGIN_BLOCK:
		CHECK_EQUAL(total->shared, 0);
		if (!origin_certain(&transfer->origin))
			break;
		CHECK_EQUAL(total->unknown, 0);
		CHECK_EQUAL(memory ? total->moved : total->direct, 0);
		if (!memory && !fuse)
			CHECK_EQUAL(total->moved, taken);
		CHECK(!(total->why &
			~(RSPLICE_WHY_PARTIAL | RSPLICE_WHY_ALIGNMENT | RSPLICE_WHY_READAHEAD)));
		CHECK(!(total->why & RSPLICE_WHY_READAHEAD) ||
		      transfer->flags & RSPLICE_F_READAHEAD);
		break;
	case ORIGIN_TMPFS:
		if (transfer->flags & RSPLICE_F_SHARE && !memory && !fuse)
			CHECK_EQUAL(total->shared, taken);
		else
			CHECK_EQUAL(total->copied, taken);
		CHECK(!(total->why & ~RSPLICE_WHY_NO_DIRECT));
		break;
	case ORIGIN_ZERO:
		CHECK_EQUAL(total->copied, taken);
		CHECK_EQUAL(total->why, taken ? RSPLICE_WHY_GENERATED : 0);
		break;
	case ORIGIN_PIPE:
		CHECK_EQUAL(memory ? total->copied : fuse ? total->unknown : total->moved, taken);
		CHECK_EQUAL(total->why, memory && taken ? RSPLICE_WHY_PIPE : 0);
		break;
	default:
		if (transfer->flags & RSPLICE_F_SHARE && !memory && !fuse)
			CHECK_EQUAL(total->shared, taken);
		else
			CHECK_EQUAL(total->copied, taken);
		CHECK(!(total->why & ~(RSPLICE_WHY_SOCKET | RSPLICE_WHY_PIPE)));
	}
}

static const char **lack(const struct transfer *transfer)
{
	struct sink sink;

	if (sink_open(&sink, transfer->sink_kind, 0))
		return &lacking[NR_ORIGINS + transfer->sink_kind];
	sink_close(&sink);
	return &lacking[transfer->origin_kind];
}

static bool begin(struct transfer *transfer)
{
	const char *why;

	about("%s", transfer_name(transfer));
	why = transfer_begin(transfer);
	if (why)
		*lack(transfer) = why;
	return !why;
}

static void try_transfer(struct transfer transfer)
{
	if (!begin(&transfer))
		return;
	transfer_finish(&transfer);
	check_dispositions(&transfer);
	transfer_end(&transfer);
	tried++;
}

static bool refused(const struct transfer *transfer, int error)
{
	(void)transfer;
	return error == EOPNOTSUPP;
}

/* STRICT either transfers without a copy, or fails and leaves everything where it was. */
static void try_strictly(struct transfer transfer)
{
	bool share = transfer.flags & RSPLICE_F_SHARE;
	ssize_t done;

	transfer.flags |= RSPLICE_F_STRICT;
	transfer.may_fail = refused;
	if (!begin(&transfer))
		return;
	do
		done = transfer_step(&transfer);
	while (done > 0 && transfer.at < transfer.origin.size);
	CHECK_EQUAL(transfer.total.copied, 0);
	CHECK_EQUAL(transfer.total.unknown, 0);
	CHECK(share || !transfer.total.shared);
	if (transfer.origin_kind == ORIGIN_ZERO || transfer.origin_kind == ORIGIN_TMPFS)
		CHECK(share || done < 0);
	/* It refuses nothing that needs no copy. */
	if (is_file(transfer.origin_kind) && origin_certain(&transfer.origin) &&
	    !in_memory(transfer.sink_kind) && transfer.sink_kind != SINK_FUSE)
		CHECK(done >= 0);
	if (transfer.origin_kind == ORIGIN_PIPE && !in_memory(transfer.sink_kind) &&
	    transfer.sink_kind != SINK_FUSE)
		CHECK(done >= 0);
	transfer_end(&transfer);
	tried++;
}

static void try_all_flags(struct transfer transfer)
{
	static const unsigned int flags[] = {0, RSPLICE_F_NONBLOCK, RSPLICE_F_SHARE, RSPLICE_F_MORE,
					     RSPLICE_F_READAHEAD};
	size_t i;

	for (i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		if (flags[i] == RSPLICE_F_READAHEAD && transfer.sink_kind != SINK_FUSE)
			continue;
		/* Of these rsplice_fuse_reply() has no MORE, and TCP would wait with it. */
		if (flags[i] == RSPLICE_F_MORE && transfer.sink_kind >= SINK_TCP)
			continue;
		transfer.flags = flags[i];
		try_transfer(transfer);
		if (flags[i] != RSPLICE_F_MORE && flags[i] != RSPLICE_F_READAHEAD)
			try_strictly(transfer);
	}
}

/* Sizes, offsets and places about the ends of blocks and pages. */
static void try_places(struct transfer transfer)
{
	static const size_t places[] = {0, 1, 511, 512, 513, 4095, 4096, 4097};
	size_t nr = sizeof(places) / sizeof(places[0]), i, j;

	transfer.flags = 0;
	for (i = 0; i < nr; i++) {
		for (j = 0; j < nr; j++) {
			transfer.from = places[i];
			transfer.len = places[j] ? places[j] : 3 * PAGE;
			/* Each call waits for the disk: a few dozen will do. */
			transfer.size = transfer.len >= PAGE - 1 ? 5 * PAGE + 100
					: transfer.len > 1	 ? 6 * KIB + 100
								 : places[i] + 5;
			transfer.start = in_memory(transfer.sink_kind) ? places[(i + j) % nr] : 0;
			try_transfer(transfer);
			transfer.start = 0;
			if (i == j)
				try_strictly(transfer);
		}
	}
}

static void try_pair(enum origin_kind origin, enum sink_kind sink)
{
	struct transfer transfer = {
		.origin_kind = origin, .sink_kind = sink, .size = 5 * PAGE + 100, .len = 2 * PAGE};

	/* Datagrams are cut by a shorter len, as recv(2) cuts them: not what is tried here. */
	try_all_flags(transfer);
	transfer.positions = true;
	try_all_flags(transfer);
	transfer.positions = false;
	if (origin != ORIGIN_DGRAM && origin != ORIGIN_BLOCK && sink != SINK_HUGE &&
	    sink != SINK_TMPFS && sink != SINK_TCP)
		try_places(transfer);
	transfer.len = 60 * KIB;
	transfer.size = 64 * KIB;
	try_transfer(transfer);
	transfer.size = 512; /* one block, which every disk has */
	try_transfer(transfer);
	transfer.size = 1;
	try_transfer(transfer);
	transfer.size = 0;
	try_transfer(transfer);
	if (is_file(origin) || origin == ORIGIN_TMPFS) {
		transfer.size = 2 * PAGE;
		transfer.from = 3 * PAGE; /* behind the end */
		try_transfer(transfer);
	}
	if (sink == SINK_FUSE || sink == SINK_TCP || sink == SINK_TINY)
		return;
	/* More than a private pipe holds, and than io_uring is asked for in one read. */
	transfer.size = 3 * MIB + 777;
	transfer.from = 0;
	transfer.len = transfer.size;
	if (origin != ORIGIN_ZERO || in_memory(sink))
		try_transfer(transfer);
	transfer.from = transfer.start = 511;
	if (is_file(origin))
		try_transfer(transfer);
}

/* Which pages of a reply are copied for the mark of readahead: of 16, and of 255. */
static void try_readahead(size_t pages, size_t copied)
{
	struct transfer transfer = {.origin_kind = ORIGIN_DIRECT,
				    .sink_kind = SINK_FUSE,
				    .size = pages * PAGE,
				    .len = pages * PAGE,
				    .flags = RSPLICE_F_READAHEAD};

	if (!begin(&transfer))
		return;
	CHECK_EQUAL(transfer_step(&transfer), pages * PAGE);
	CHECK_EQUAL(transfer.total.moved + transfer.total.unknown, (pages - copied) * PAGE);
	CHECK_EQUAL(transfer.total.copied, copied * PAGE);
	CHECK_EQUAL(transfer.total.why, RSPLICE_WHY_READAHEAD);
	transfer_end(&transfer);
	tried++;
}

int main(int argc, char **argv)
{
	int origin, sink, i;

	use_directory(argc, argv);
	limit_seconds(100);
	for (origin = 0; origin < NR_ORIGINS; origin++) {
		for (sink = 0; sink < NR_SINKS; sink++)
			try_pair(origin, sink);
	}
	try_readahead(1, 1);
	try_readahead(16, 6);	/* 0, 1, 2, 4, 8 and 12 */
	try_readahead(255, 10); /* 0, the powers of two to 128, and 192 */
	printf("%u transfers\n", tried);
	for (i = 0; i < NR_ORIGINS + NR_SINKS; i++) {
		if (lacking[i])
			printf("lacking: %s\n", lacking[i]);
	}
	return 0;
}
