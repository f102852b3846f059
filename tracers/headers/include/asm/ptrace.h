/* SPDX-License-Identifier: MIT */
#include <linux/ptrace.h>
