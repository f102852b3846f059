// SPDX-License-Identifier: GPL-2.0-only
/*
 * Fires the tracepoint rsplice_copied for every run of the functions that copy between the kernel
 * and an iterator (lib/iov_iter.c). BPF cannot be attached to these, since lib/ is built without
 * ftrace; register_kretprobe() can.
 *
 * Some of them call each other, by version and compiler: what is called from another one is part
 * of that, and not told again. That shows in its return address, which lies in the caller, or is
 * the trampoline's where the caller jumped to it.
 */
#include <linux/kallsyms.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/string.h>
#include <linux/uio.h>
#include <linux/version.h>

#define CREATE_TRACE_POINTS
#include "rsplice_copies.h"

#define MAX_COPIES 512 /* at a time, of one function: a copy may wait for a page */

struct copier {
	const char *name;
	bool to_iterator;
	struct kretprobe probe;
	unsigned long start;
	unsigned long end;
};

/*
 * Each returns the bytes that it copied. What a kernel does not have is passed over. Not among
 * them is iov_iter_zero(): a read with O_DIRECT past the end of a file clears what is no payload.
 */
static struct copier copiers[] = {
	{"_copy_to_iter", true},
	{"_copy_from_iter", false},
	{"_copy_from_iter_nocache", false},
	{"_copy_from_iter_flushcache", false},
	{"_copy_mc_to_iter", true},
	{"copy_page_to_iter", true},
	{"copy_page_to_iter_nofault", true},
	{"copy_page_from_iter", false},
	{"copy_page_from_iter_atomic", false},	/* 5.14 to 6.15 */
	{"copy_folio_from_iter_atomic", false}, /* 6.16 */
	{"csum_and_copy_to_iter", true},
	{"csum_and_copy_from_iter", false},
	{"hash_and_copy_to_iter", true},
};

static unsigned long trampoline; /* that all of our probes return to */

/* Where the function that is called here returns to: with a probe on it, the trampoline. */
static noinline unsigned long own_return(void)
{
	return (unsigned long)__builtin_return_address(0);
}

static int __init find_trampoline(void)
{
	struct kretprobe probe = {.kp.addr = (void *)own_return};
	int error = register_kretprobe(&probe);

	if (error)
		return error;
	trampoline = own_return();
	unregister_kretprobe(&probe);
	return 0;
}

/* The end of the function at *start*, 0 where the kernel cannot tell: "name+0x0/0x1a0". */
static unsigned long __init end_of(unsigned long start)
{
	char name[KSYM_SYMBOL_LEN], *size;
	unsigned long offset, length;

	sprint_symbol(name, start);
	size = strrchr(name, '+');
	if (!size || sscanf(size, "+0x%lx/0x%lx", &offset, &length) != 2)
		return 0;
	return start - offset + length;
}

static bool is_nested(unsigned long caller)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(copiers); i++)
		if (caller >= copiers[i].start && caller < copiers[i].end)
			return true;
	return caller == trampoline;
}

/* Before 6.5 there are iterators of pipe buffers, which take the page itself. */
static bool takes_page(struct kretprobe *probe, struct pt_regs *regs)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 5, 0)
	/* copy_page_to_iter(page, offset, bytes, iterator) */
	return !strcmp(probe->kp.symbol_name, "copy_page_to_iter") &&
	       iov_iter_is_pipe((struct iov_iter *)regs->cx);
#else
	return false;
#endif
}

/* Not 0: the return is not wanted. */
static int enter_copy(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct kretprobe *probe = get_kretprobe(instance);

	return !probe || takes_page(probe, regs) || is_nested(regs_get_kernel_stack_nth(regs, 0));
}

static int leave_copy(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct kretprobe *probe = get_kretprobe(instance);
	unsigned long copied = regs_return_value(regs);

	if (probe && copied)
		trace_rsplice_copied(container_of(probe, struct copier, probe)->to_iterator,
				     copied);
	return 0;
}
NOKPROBE_SYMBOL(leave_copy);

static void stop(int registered)
{
	unsigned long missed = 0;

	while (registered--) {
		if (!copiers[registered].start)
			continue;
		unregister_kretprobe(&copiers[registered].probe);
		missed += copiers[registered].probe.nmissed;
	}
	if (missed)
		pr_warn("rsplice_copies: %lu copies were not told of\n", missed);
	tracepoint_synchronize_unregister();
}

static int __init start(void)
{
	int i, error = find_trampoline();

	for (i = 0; !error && i < ARRAY_SIZE(copiers); i++) {
		struct copier *copier = &copiers[i];

		copier->probe.kp.symbol_name = copier->name;
		copier->probe.entry_handler = enter_copy;
		copier->probe.handler = leave_copy;
		copier->probe.maxactive = MAX_COPIES;
		error = register_kretprobe(&copier->probe);
		if (error == -ENOENT) {
			error = 0;
			continue;
		}
		if (error) {
			pr_err("rsplice_copies: no probe at %s: %d\n", copier->name, error);
			break;
		}
		copier->start = (unsigned long)copier->probe.kp.addr;
		copier->end = end_of(copier->start);
		if (!copier->end)
			error = -EOPNOTSUPP; /* what it calls would be counted twice */
	}
	if (error)
		stop(i);
	return error;
}

static void __exit end(void)
{
	stop(ARRAY_SIZE(copiers));
}

module_init(start);
module_exit(end);
MODULE_DESCRIPTION("Tells BPF of the kernel's copies, for rsplice");
MODULE_LICENSE("GPL");
