// SPDX-License-Identifier: GPL-2.0-only
/* Processes: followed from fork to exit. */

int tp_sched_process_fork(u64 *ctx)
{
	u64 parent = tracepoint_arg(ctx, 0), child = tracepoint_arg(ctx, 1);
	u32 parent_tgid = read32(parent + TASK_TGID), child_tgid = read32(child + TASK_TGID);
	u64 key, aside = 0;
	u32 zero = 0;

	/* The child does not run before this returns. A thread joins its group. */
	if (parent_tgid == child_tgid)
		return 0;
	key = process_of(parent_tgid, parent);
#if TRACES
	{
		u32 tid = read32(parent + TASK_PID);
		struct thread *thread = threads.lookup(&tid);

		if (thread && thread->adopter)
			key = thread->adopter;
		else if (thread)
			aside = thread->aside;
	}
#endif
	if (key && follow(child_tgid, child, key, aside))
		nr_started.increment(zero);
	return 0;
}

int tp_sched_process_exec(u64 *ctx)
{
	u64 task = tracepoint_arg(ctx, 0), *key;
	u32 tgid = read32(task + TASK_TGID);
	struct process *process;

	key = followed.lookup(&tgid);
	if (!key)
		return 0;
	process = processes.lookup(key);
	if (process)
		read_kernel(process->comm, sizeof(process->comm), (void *)(task + TASK_COMM));
#if OWNED
	if (!is_owners(task)) {
		if (process)
			process->ended = LET_GO;
		unfollow(tgid);
	}
#endif
	return 0;
}

#if FINDINGS && USDT
/*
 * A thread whose process has been seen to end. do_exit() (kernel/exit.c) counts signal->live down,
 * and in exit_mm() wakes who waits for the thread, before it comes to the tracepoint: who comes to
 * that first with a count of 0 is taken for the last. What this one left open is left open still.
 */
static __always_inline void end_late(u64 *ctx, u32 tid)
{
	struct inside *inside = usdt_inside.lookup(&tid);
	struct process *process;
	u64 key;

	if (!inside)
		return;
	key = inside->process;
	process = processes.lookup(&key);
	if (process && process->ended == 1)
		look_at_end(ctx, key, tid, false);
}
#endif

int tp_sched_process_exit(u64 *ctx)
{
	u64 task = tracepoint_arg(ctx, 0), *key, signal;
	u32 tgid = read32(task + TASK_TGID), tid = read32(task + TASK_PID);
	struct process *process;
	u64 ended;
	u32 zero = 0;

	key = followed.lookup(&tgid);
	if (!key) {
#if FINDINGS && USDT
		end_late(ctx, tid);
#endif
		return 0;
	}
	ended = *key;
	notes.delete(&tid);
#if MEASURED
	copied_by.delete(&tid);
#endif
#if FINDINGS
	offers.delete(&tid);
#endif
	signal = read64(task + TASK_SIGNAL);
	if (read32(signal + SIGNAL_LIVE) != 0) {
#if FINDINGS
		look_at_end(ctx, ended, tid, false);
#endif
		return 0;
	}
	process = processes.lookup(key);
	if (process) {
		read_kernel(process->comm, sizeof(process->comm),
			    (void *)(read64(task + TASK_LEADER) + TASK_COMM));
		process->ended = 1;
		nr_ended.increment(zero);
	}
	unfollow(tgid);
#if FINDINGS
	look_at_end(ctx, ended, tid, true);
#endif
	return 0;
}
