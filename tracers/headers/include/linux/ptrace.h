/* SPDX-License-Identifier: MIT */
#ifndef RSPLICE_LINUX_PTRACE_H
#define RSPLICE_LINUX_PTRACE_H

#include <linux/types.h>

/* As BCC's helpers name them (x86-64); programs here use offsets from BTF. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};

#endif
