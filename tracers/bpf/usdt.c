// SPDX-License-Identifier: GPL-2.0-only
/*
 * The USDT probes of librsplice (csrc/probes.h). One program serves every place where a probe
 * stands; the attachment's cookie is the number of the place, and the table usdt_sites tells which
 * probe it is and where its arguments are (usdt.py).
 *
 * It may be preempted, and run again for another thread: maps by CPU would lose counts. Variables
 * too: from 6.13 on those of a program without tail calls are kept by CPU (bpf_enable_priv_stack(),
 * kernel/bpf/verifier.c), as though programs of uprobes were not preempted (uprobe_prog_run(),
 * kernel/trace/bpf_trace.c), and threads get each other's. Hence a tail call, which leads nowhere.
 */
#if USDT
#define NR_ARGUMENTS 6
#define NR_SITES     1024
#define MAX_MARKS    8192
#define MOST_BYTES   (1ULL << 40) /* no call carries more: such an argument is garbage */

/* The order is that of usdt.py. */
enum mark { MARK_RESERVE, MARK_FILL, MARK_PUBLISH, MARK_FALLBACK, MARK_ABORT };
#define HOW_REFERENCE 1 /* csrc/probes.h */
enum place { PLACE_CONSTANT, PLACE_REGISTER, PLACE_MEMORY };

struct argument {
	u64 value; /* the constant, or what is added to the register to find it in memory */
	u32 place;
	u32 reg;   /* where in struct pt_regs */
	u32 shift; /* bits above it in a word */
	u32 is_signed;
};

struct site {
	u32 mark;
	u32 nr_arguments;
	struct argument arguments[NR_ARGUMENTS];
};
BPF_ARRAY(usdt_sites, struct site, NR_SITES);

struct mark_key {
	u64 process;
	u32 mark;
	u32 detail; /* how, or why */
};

struct mark_sum {
	u64 calls;
	u64 bytes[5]; /* one number, but of "publish" the five dispositions */
};
BPF_HASH(usdt_marks, struct mark_key, struct mark_sum, MAX_MARKS);
BPF_ARRAY(usdt_lost, u64, 1);
BPF_PROG_ARRAY(usdt_nowhere, 1);
BPF_PROG_ARRAY(usdt_nowhere_each, 1); /* an array is for programs of one way to attach */

/*
 * A call ends in the thread it began in. Copies of the library in one process repeat each other's
 * numbers.
 */
struct open_key {
	u64 process;
	u64 id;
	u64 tid;
};
BPF_TABLE("lru_hash", struct open_key, u64, usdt_open, 4096); /* bytes reserved */

static u64 (*attach_cookie)(void *ctx) = (void *)174; /* bpf_get_attach_cookie(), 5.15 */

static __always_inline u64 value_of(u64 *ctx, struct argument *argument)
{
	u64 value = argument->value, reg = 0;
	u32 shift = argument->shift & 63;

	if (argument->place != PLACE_CONSTANT) {
		read_kernel(&reg, sizeof(reg), (void *)ctx + (argument->reg & 0xff));
		value = argument->place == PLACE_REGISTER ? reg : value + reg;
	}
	if (argument->place == PLACE_MEMORY) {
		reg = 0;
		read_user(&reg, sizeof(reg), (void *)value);
		value = reg;
	}
	value <<= shift;
	return argument->is_signed ? (u64)((s64)value >> shift) : value >> shift;
}

static __always_inline void count_lost_mark(void)
{
	u32 zero = 0;
	u64 *lost_marks = usdt_lost.lookup(&zero);

	if (lost_marks)
		__sync_fetch_and_add(lost_marks, 1);
}

/* values: those of the probe "reserve". */
static __always_inline void open_call(u64 process, u64 *values)
{
	u64 id = values[0], reserved = values[3];
	u32 tid = bpf_get_current_pid_tgid();
	struct open_key key = {.process = process, .id = id, .tid = tid};
	struct inside *inside, first = {.process = process};

	if (usdt_open.update(&key, &reserved)) {
		count_lost_mark();
		return;
	}
	count_open(1);
	inside = usdt_inside.lookup(&tid);
	if (!inside || inside->process != process) {
		usdt_inside.update(&tid, &first);
		inside = usdt_inside.lookup(&tid);
	}
	if (!inside) {
		count_lost_mark();
		return;
	}
	inside->depth++;
	inside->bytes += reserved;
	inside->in = values[1];
	inside->out = values[2];
#if CONTENTS
	inside->size = tmpfs_size(inside->out);
#endif
}

/* An abort of part of what was reserved ends no call: the rest is published. */
static __always_inline void close_call(u64 process, u64 id, u64 aborted)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct open_key key = {.process = process, .id = id, .tid = tid};
	u64 *known = usdt_open.lookup(&key), reserved;
	struct inside *inside;

	if (!known || aborted < *known)
		return;
	reserved = *known;
	usdt_open.delete(&key);
	count_open(-1);
	inside = usdt_inside.lookup(&tid);
	if (!inside || inside->process != process)
		return;
	inside->bytes -= reserved;
	if (inside->depth > 1)
		inside->depth--;
	else
		usdt_inside.delete(&tid);
}

/* What the marks in a call say of its pages; how: those of the probe "fill" came into them. */
static __always_inline void see_pages(u64 process, u32 mark, u32 how)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct inside *inside = usdt_inside.lookup(&tid);

	if (!inside || inside->process != process)
		return;
	if (mark == MARK_FILL && how == HOW_REFERENCE)
		inside->refers = 1;
#if CONTENTS
	if (mark == MARK_PUBLISH)
		look_at_tail(process, inside);
#endif
}

/* Adds nr_bytes of the arguments, from the first on. Loops: code written out takes long to compile.
 */
static __always_inline void add_mark(struct mark_key *key, u64 *values, u32 first, u32 nr_bytes)
{
	struct mark_sum none = {}, *sum = usdt_marks.lookup_or_try_init(key, &none);
	u32 i;

	if (!sum) {
		count_lost_mark();
		return;
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < nr_bytes; i++) {
		if (values[first + i] > MOST_BYTES) {
			count_lost_mark();
			return;
		}
	}
	__sync_fetch_and_add(&sum->calls, 1);
#pragma clang loop unroll(disable)
	for (i = 0; i < nr_bytes; i++)
		__sync_fetch_and_add(&sum->bytes[i], values[first + i]);
}

static __always_inline void see_mark(u64 *ctx)
{
	u32 index = attach_cookie(ctx), first = 1, i;
	struct site *site = usdt_sites.lookup(&index);
	u64 process, values[NR_ARGUMENTS] = {};
	struct mark_key key = {};

	if (!site)
		return;
	process = process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task());
	if (!process)
		return;
#pragma clang loop unroll(disable)
	for (i = 0; i < NR_ARGUMENTS; i++) {
		if (i < site->nr_arguments)
			values[i] = value_of(ctx, &site->arguments[i]);
	}
	key.process = process;
	key.mark = site->mark;
	if (key.mark == MARK_RESERVE) {
		first = 3;
		open_call(process, values);
	}
	if (key.mark == MARK_FILL || key.mark == MARK_FALLBACK)
		key.detail = values[2] & 0xff;
	see_pages(process, key.mark, key.detail);
	if (key.mark == MARK_PUBLISH || key.mark == MARK_ABORT)
		close_call(process, values[0], key.mark == MARK_PUBLISH ? ~0ULL : values[1]);
	add_mark(&key, values, first, key.mark == MARK_PUBLISH ? 5 : 1);
	journey_mark(process, key.mark, values[0],
		     key.mark == MARK_PUBLISH
			     ? values[1] + values[2] + values[3] + values[4] + values[5]
			     : values[first],
		     key.detail, key.mark == MARK_PUBLISH || key.mark == MARK_ABORT);
}

/* Attached by one link to all places. */
int usdt_mark(u64 *ctx)
{
	see_mark(ctx);
	usdt_nowhere.call(ctx, 0);
	return 0;
}

/* Attached to each place by itself. */
int usdt_mark_each(u64 *ctx)
{
	see_mark(ctx);
	usdt_nowhere_each.call(ctx, 0);
	return 0;
}
#endif
