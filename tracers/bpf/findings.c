// SPDX-License-Identifier: GPL-2.0-only
/*
 * Looks at a pipe's buffers before the call that consumes them: afterwards their pages may be
 * anybody's.
 */
#if FINDINGS
#define SLOTS_AT_ONCE	32 /* of one program; the next goes on */
#define PROGRAM_BUFFERS 0
#define PROGRAM_COMPARE 1
#define PROGRAM_OFFER	2
BPF_PROG_ARRAY(enter_programs, 3); /* io_uring.c has some of its own */

static __always_inline bool is_fuse_device(u64 file)
{
	u64 inode = read64(file + FILE_INODE);

	return (read16(inode + INODE_MODE) & S_IFMT) == S_IFCHR &&
	       (u32)read32(inode + INODE_RDEV) == FUSE_DEVICE;
}

/* Begins to look at what a call, or a request, is about to take out of *file*: false if nothing. */
static __always_inline bool look_into(struct inspection *inspection, u64 process, u32 via, u64 file)
{
	if (!file || (read16(read64(file + FILE_INODE) + INODE_MODE) & S_IFMT) != S_IFIFO)
		return false;
	inspect_pipe(inspection, pipe_of(file));
	if (!inspection->slots)
		return false;
	inspection->key.process = process;
	inspection->key.via = via;
	inspection->reply = inspection->published = 0;
	inspection->next = inspection->total = inspection->folio.first = inspection->folio.span = 0;
	inspection->source = file;
	inspection->destination = USER_MEMORY;
	inspection->bytes = ~0ULL; /* vectors are not added up: see already_judged() */
#if CONTENTS
	__builtin_memset(inspection->changed, 0, sizeof(inspection->changed));
#endif
	return true;
}

/* What a splice(2) does with it. */
static __always_inline void find_destination(struct inspection *inspection, u64 task, u64 regs)
{
	u32 moves = read64(regs + REGS_ARG5) & SPLICE_F_MOVE;

	inspection->destination = file_of(task, read64(regs + REGS_ARG2));
	inspection->bytes = read64(regs + REGS_ARG4);
	inspection->published = moves && handles_own_pages(inspection->key.process, task);
	if (is_fuse_device(inspection->destination)) {
		inspection->key.via = VIA_FUSE_REPLY;
		inspection->reply = moves;
	}
}

/* Whether nobody can read what is in the pipe once *file* is closed. */
#define FMODE_READ 1
static __always_inline bool last_to_read(u64 file, u64 pipe)
{
	u64 sb = read64(read64(file + FILE_INODE) + INODE_SB);

	if (read64(file + FILE_REF) != FILE_REF_ONE)
		return false;
	/* A named pipe keeps its payload for later readers while a writer has it open. */
	if (read64(sb + SB_MAGIC) != PIPEFS_MAGIC)
		return (u32)read32(pipe + PIPE_FILES) == 1;
	return (u32)read32(file + FILE_MODE) & FMODE_READ && (u32)read32(pipe + PIPE_READERS) == 1;
}

/*
 * The pipe that is stranded by the end of *file*; 0 if none is. A file that others have too, or
 * that a process has twice, does not count.
 */
static __always_inline u64 stranded_pipe(u64 file)
{
	u64 inode = read64(file + FILE_INODE), pipe;

	if (!file || (read16(inode + INODE_MODE) & S_IFMT) != S_IFIFO)
		return 0;
	pipe = pipe_of(file);
	if (pipe_index(pipe + PIPE_HEAD) == pipe_index(pipe + PIPE_TAIL))
		return 0;
	return last_to_read(file, pipe) ? pipe : 0;
}

static __always_inline void record_stranded(struct inspection *inspection, u64 pipe, u64 file)
{
	u32 zero = 0;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	u64 sb = read64(read64(file + FILE_INODE) + INODE_SB);

	if (!classes)
		return;
	inspect_pipe(inspection, pipe);
	load_buffer_facts(&inspection->facts, classes,
			  slot_at(inspection->bufs, inspection->tail, inspection->mask));
	inspection->key.source = read64(sb + SB_MAGIC) == PIPEFS_MAGIC ? END_PIPE : END_FIFO;
	record(&inspection->key, &inspection->facts, 0);
}

/* close(2), and what dup2(2) and dup3(2) close: payload in a pipe that nobody reads any more. */
static __always_inline void look_at_close(u64 nr, u64 regs)
{
	u64 task = bpf_get_current_task(), process = process_of_task(task), file, pipe;
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_ENTER);

	if (!process || !inspection || read32(task + TASK_STATUS) & TS_COMPAT || nr & X32_BIT)
		return;
	file = file_of(task, read64(regs + REGS_ARG0));
	if (nr != NR_CLOSE) {
		u64 replaced = file_of(task, read64(regs + REGS_ARG1));

		if (!file || file == replaced)
			return;
		file = replaced;
	}
	pipe = stranded_pipe(file);
	if (!pipe)
		return;
	__builtin_memset(&inspection->key, 0, sizeof(inspection->key));
	inspection->key.process = process;
	inspection->key.via = VIA_CLOSE;
	inspection->key.name = STRANDED;
	record_stranded(inspection, pipe, file);
}

/*
 * Goes past the buffers at the tail that nothing is wrong with, as with nearly all. False where
 * one is left to be judged.
 */
static __always_inline bool pass_sound(struct inspection *inspection)
{
	u32 zero = 0;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	u64 slot, operations, i, at = inspection->tail, total = inspection->total;

	if (!classes)
		return false;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SLOTS; i++) {
		if (i >= inspection->slots || total >= inspection->bytes)
			return true;
		slot = look_at(slot_at(inspection->bufs, at++, inspection->mask));
		operations = seen64(slot, BUF_OPS);
		if (operations == classes->operations[CACHE_BUFFER]) {
			struct waiting buffer = {.class = CACHE_BUFFER};

			load_folio(&inspection->folio, seen64(slot, BUF_PAGE));
			buffer.flags = seen32(slot, BUF_FLAGS);
			buffer.mapping = inspection->folio.mapping;
			if (judge_buffer(&buffer))
				break;
		} else if (operations == classes->operations[USER_BUFFER]) {
			break;
		}
		total += (u32)seen32(slot, BUF_LEN);
	}
	inspection->next = i;
	inspection->total = total;
	return false;
}

int tp_sys_enter(u64 *ctx)
{
	u64 regs = tracepoint_arg(ctx, 0), nr = tracepoint_arg(ctx, 1), task, process, file;
	u32 index = nr & (TABLE_SIZE - 1), shape, zero = 0;
	u64 *entries = call_table.lookup(&index);
	struct inspection *inspection;

	if (!entries)
		return 0;
	shape = *entries & 0xff;
	if (shape == SHAPE_CLOSE)
		look_at_close(nr, regs);
	if (shape != SHAPE_SPLICE && shape != SHAPE_READ && shape != SHAPE_VMSPLICE)
		return 0;
	task = bpf_get_current_task();
	process = process_of_task(task);
	if (!process || read32(task + TASK_STATUS) & TS_COMPAT || nr & X32_BIT)
		return 0;
	inspection = inspection_at(AT_ENTER);
	file = file_of(task, read64(regs + REGS_ARG0));
	if (!inspection || !look_into(inspection, process, *entries >> 8 & 0xff, file))
		return 0;
	if (shape == SHAPE_VMSPLICE && read32(file + FILE_MODE) & FMODE_WRITE)
		return 0;
	if (shape == SHAPE_SPLICE)
		find_destination(inspection, task, regs);
	if (inspection->key.via == VIA_READ)
		inspection->bytes = read64(regs + REGS_ARG2);
#if CONTENTS
	enter_programs.call(ctx, PROGRAM_COMPARE);
#endif
	if (!pass_sound(inspection))
		enter_programs.call(ctx, PROGRAM_BUFFERS);
	inspection->next = 0;
	if (inspection->reply)
		enter_programs.call(ctx, PROGRAM_OFFER);
	return 0;
}

/*
 * Buffers that a call does not take after all are met again by the next one. Heads and tails of a
 * ring only grow, so that the number of a slot tells.
 */
static __always_inline bool already_judged(struct inspection *inspection, u32 number)
{
	u64 key = read64(read64(inspection->source + FILE_INODE) + INODE_INO);
	struct judged *known = judged.lookup(&key);
	struct judged new = {.bufs = inspection->bufs, .next = number + 1};

	if (known && known->bufs == new.bufs && (s32)(number - (u32)known->next) < 0)
		return true;
	judged.update(&key, &new);
	return false;
}

/* The first occurrence in a call: most calls have none, and need no names of their ends. */
static __always_inline void find_ends(struct inspection *inspection)
{
	struct end end = {};

	fill_end(&end, inspection->source);
	inspection->key.source = end.id;
	fill_end(&end, inspection->destination);
	inspection->key.destination = end.id;
}

/* Whether tp_compare has found that the buffer at *next* of the pipe is not what was queued. */
static __always_inline bool has_changed(struct inspection *inspection, u32 next)
{
	return CONTENTS && inspection->changed[next / 32 & (MAX_SLOTS / 32 - 1)] >> next % 32 & 1;
}

/* Judges the buffer at *next* of the pipe. Returns its length. */
static __always_inline u32 judge_slot(struct inspection *inspection, struct buffer_classes *classes,
				      u32 next)
{
	u32 number = inspection->tail + next;
	u64 slot = slot_at(inspection->bufs, number, inspection->mask);
	u64 operations = read64(slot + BUF_OPS);
	u32 length = read32(slot + BUF_LEN);
	struct waiting buffer = {.published = inspection->published};

	/* Others cannot be wrong, and need no look at their pages. */
	if (operations == classes->operations[CACHE_BUFFER])
		buffer.class = CACHE_BUFFER;
	else if (operations == classes->operations[USER_BUFFER])
		buffer.class = USER_BUFFER;
	else
		return length;
	load_folio(&inspection->folio, read64(slot + BUF_PAGE));
	buffer.flags = read32(slot + BUF_FLAGS);
	buffer.mapping = inspection->folio.mapping;
	buffer.mapped = inspection->folio.mapped;
	buffer.changed = has_changed(inspection, next);
	inspection->key.name = judge_buffer(&buffer);
	/* A change is told once by itself, also of a buffer whose first part has been judged. */
	if (!inspection->key.name || (already_judged(inspection, number) && !buffer.changed))
		return length;
	inspection->key.reason = reason_of(inspection->key.name, buffer.changed);
	find_ends(inspection);
	inspection->facts.class = buffer.class;
	load_slot_facts(&inspection->facts, slot);
	record(&inspection->key, &inspection->facts, 0);
	if (inspection->key.name == TRUNCATED_IN_FLIGHT)
		name_remover(&inspection->key, inspection->facts.page);
	return length;
}

/* Judges some of what waits in the pipe. Returns whether that was all. */
static __always_inline bool judge_some(struct inspection *inspection)
{
	u32 zero = 0, i, next = inspection->next, slots = inspection->slots;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	u64 total = inspection->total;

	if (!classes)
		return true;
#pragma clang loop unroll(disable)
	for (i = 0; i < SLOTS_AT_ONCE; i++) {
		if (next >= slots || total >= inspection->bytes)
			return true;
		total += judge_slot(inspection, classes, next++);
	}
	inspection->next = next;
	inspection->total = total;
	return false;
}

int tp_buffers(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_ENTER);

	if (!inspection)
		return 0;
	if (!judge_some(inspection))
		enter_programs.call(ctx, PROGRAM_BUFFERS);
	inspection->next = 0;
	if (inspection->reply)
		enter_programs.call(ctx, PROGRAM_OFFER);
	return 0;
}

#if CONTENTS
static __always_inline bool can_change(struct buffer_classes *classes, u64 slot)
{
	u64 operations = read64(slot + BUF_OPS);

	return operations == classes->operations[CACHE_BUFFER] ||
	       operations == classes->operations[USER_BUFFER];
}

/* Compares some of what waits in the pipe with what was queued. Returns whether that was all. */
static __always_inline bool compare_some(struct inspection *inspection, u32 place)
{
	u32 zero = 0, i;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	struct reading *reading = reading_at(place);

	if (!classes || !reading)
		return true;
#pragma clang loop unroll(disable)
	for (i = 0; i < SLOTS_AT_ONCE; i++) {
		u32 next = inspection->next, number = inspection->tail + next;
		u64 slot = slot_at(inspection->bufs, number, inspection->mask);

		if (next >= inspection->slots || inspection->total >= inspection->bytes) {
			inspection->next = inspection->total = 0;
			return true;
		}
		inspection->next++;
		inspection->total += (u32)read32(slot + BUF_LEN);
		if (can_change(classes, slot) &&
		    read_contents(reading, read64(inspection->source + FILE_INODE),
				  inspection->bufs, inspection->mask, number) &&
		    have_contents_changed(reading))
			inspection->changed[next / 32 & (MAX_SLOTS / 32 - 1)] |= 1U << next % 32;
	}
	return false;
}

int tp_compare(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_ENTER);

	if (inspection)
		enter_programs.call(ctx, compare_some(inspection, AT_ENTER) ? PROGRAM_BUFFERS
									    : PROGRAM_COMPARE);
	return 0;
}

/* Keeps the contents of some buffers, the newest first. Returns whether these were all. */
static __always_inline bool keep_some(struct inspection *inspection, u32 place)
{
	u32 zero = 0, i;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	struct reading *reading = reading_at(place);

	if (!classes || !reading)
		return true;
#pragma clang loop unroll(disable)
	for (i = 0; i < SLOTS_AT_ONCE; i++) {
		u32 number = inspection->tail + inspection->slots - 1 - inspection->next;
		u64 slot = slot_at(inspection->bufs, number, inspection->mask);

		if (inspection->next >= inspection->slots || inspection->total >= inspection->bytes)
			return true;
		inspection->next++;
		inspection->total += (u32)read32(slot + BUF_LEN);
		if (can_change(classes, slot) &&
		    read_contents(reading, inspection->destination, inspection->bufs,
				  inspection->mask, number))
			keep_contents(reading);
	}
	return false;
}

/* Of what the call that ends has queued. */
int tp_contents(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_EXIT);

	if (inspection)
		exit_programs.call(ctx, keep_some(inspection, AT_EXIT) ? PROGRAM_WALK
								       : PROGRAM_CONTENTS);
	return 0;
}
#endif

/* Keeps what a FUSE server offers, until the request that it answers ends. */
int tp_offer(u64 *ctx)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid(), i;
	struct inspection *inspection = inspection_at(AT_ENTER);
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	struct offers *kept = offers_scratch.lookup(&zero);

	if (!inspection || !classes || !kept)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < SLOTS_AT_ONCE; i++) {
		u64 next = inspection->next;

		asm volatile("" : "+r"(next)); /* the verifier must see the bound */
		if (next >= MAX_OFFERED || next >= inspection->slots)
			goto all;
		load_buffer_facts(
			&inspection->facts, classes,
			slot_at(inspection->bufs, inspection->tail + next, inspection->mask));
		keep_offer(&kept->slots[next], &inspection->facts);
		inspection->next++;
	}
	enter_programs.call(ctx, PROGRAM_OFFER);
	return 0;
all:
	kept->process = inspection->key.process;
	kept->bytes = inspection->bytes;
	kept->nr = inspection->next;
	kept->ended = 0;
	if (offers.update(&tid, kept))
		count_lost(LOST_FINDING);
	return 0;
}

/* A reply that ended no request is a notification: fuse_notify() (fs/fuse/dev.c) moves nothing. */
int tp_reply_end(u64 *ctx)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid();
	struct inspection *inspection = inspection_at(AT_EXIT);
	struct offers *kept = offers.lookup(&tid);

	if (!inspection || !kept)
		return 0;
	if (!kept->ended && kept->bytes >= 4096) {
		__builtin_memset(&inspection->key, 0, sizeof(inspection->key));
		inspection->key.process = kept->process;
		inspection->key.source = END_PIPE;
		inspection->key.destination = END_FUSE_DEVICE;
		inspection->key.via = VIA_FUSE_REPLY;
		inspection->key.name = STEAL_REFUSED;
		inspection->key.reason = A_NOTIFICATION;
		recall_offer(&inspection->facts, &kept->slots[kept->nr > 1]);
		record(&inspection->key, &inspection->facts, 0);
	}
	offers.delete(&tid);
	return 0;
}

/* Descriptors of one program; the next goes on, up to 528 in all, 132 with the slower reads. */
#define FILES_AT_ONCE	 (DIRECT ? 16 : 4)
#define PROGRAM_STRANDED 0
#define PROGRAM_LEAKED	 1
BPF_PROG_ARRAY(exit_task_programs, 2);

/*
 * A process has ended: payload in pipes that it was the last to read. The files are still open
 * (do_exit(), kernel/exit.c).
 */
int tp_stranded(u64 *ctx)
{
	u64 task = tracepoint_arg(ctx, 0), table = read64(read64(task + TASK_FILES) + FILES_FDT);
	u64 files = read64(table + FDT_FD), file, pipe = 0;
	u32 zero = 0, i, count = read32(table + FDT_MAX);
	struct inspection *inspection = inspection_at(AT_END);

	if (!inspection || !files)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < FILES_AT_ONCE && !pipe; i++) {
		if (inspection->descriptor >= count)
			return 0;
		file = read64(files + (u64)inspection->descriptor * 8);
		inspection->descriptor++;
		pipe = stranded_pipe(file);
	}
	if (pipe)
		record_stranded(inspection, pipe, file);
	exit_task_programs.call(ctx, PROGRAM_STRANDED);
	return 0;
}

/* Goes on to tp_stranded. */
static __always_inline void find_stranded(u64 *ctx, struct inspection *inspection)
{
	inspection->key.source = inspection->key.destination = 0;
	inspection->key.via = VIA_EXIT;
	inspection->key.name = STRANDED;
	inspection->descriptor = 0;
	exit_task_programs.call(ctx, PROGRAM_STRANDED);
}

#if USDT
/* The descriptors' ends name the operation, and a file that is its source the finding. */
static __always_inline void record_leaked(struct inspection *inspection, struct inside *inside)
{
	u64 task = bpf_get_current_task(), inode = 0;
	struct end end = {};

	fill_end(&end, file_of(task, inside->in));
	inspection->key.source = end.id;
	if (END_IS_FILESYSTEM(end.id))
		inode = end.inode;
	fill_end(&end, file_of(task, inside->out));
	inspection->key.destination = end.id;
	inspection->key.name = LEAKED;
	inspection->key.via = VIA_RSPLICE;
	__builtin_memset(&inspection->facts, 0, sizeof(inspection->facts));
	inspection->facts.class = NR_CLASSES;
	inspection->facts.length = inside->bytes;
	record_all(&inspection->key, &inspection->facts, inode, inside->depth);
}

static u64 (*current_task_btf)(void) = (void *)158; /* bpf_get_current_task_btf(), 5.11 */
static u64 (*task_pt_regs)(u64 task) = (void *)175; /* bpf_task_pt_regs(), 5.15 */

/* A signal's handler may end a thread that is within a call. */
int tp_signal_deliver(u64 *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct inside *inside = usdt_inside.lookup(&tid);

	if (inside)
		inside->interrupted = 1;
	return 0;
}

/*
 * A thread has ended within calls of librsplice. Only one that has itself asked to end has come out
 * of them: others were interrupted, and the kernel frees what they had.
 */
int tp_leaked(u64 *ctx)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid();
	struct inspection *inspection = inspection_at(AT_END);
	struct inside *inside = usdt_inside.lookup(&tid);
	u64 nr = read64(task_pt_regs(current_task_btf()) + REGS_NR);

	if (!inspection || !inside)
		return 0;
	if (inside->process == inspection->key.process) {
		count_open(-(s64)inside->depth);
		if (!inside->interrupted && (nr == NR_EXIT || nr == NR_EXIT_GROUP))
			record_leaked(inspection, inside);
	}
	usdt_inside.delete(&tid);
	if (inspection->last)
		find_stranded(ctx, inspection);
	return 0;
}
#endif

/* Hands a thread that has ended, and perhaps its process, over to tp_leaked and tp_stranded. */
static __always_inline void look_at_end(u64 *ctx, u64 process, u32 tid, bool last)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_END);

	if (!inspection)
		return;
	__builtin_memset(&inspection->key, 0, sizeof(inspection->key));
	inspection->key.process = process;
	inspection->last = last;
#if USDT
	if (usdt_inside.lookup(&tid))
		exit_task_programs.call(ctx, PROGRAM_LEAKED);
#endif
	if (last)
		find_stranded(ctx, inspection);
}
#endif
