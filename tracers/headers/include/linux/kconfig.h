/* SPDX-License-Identifier: MIT */
/* BCC's own headers look for this one option. */
#define CONFIG_BPF_SYSCALL 1
