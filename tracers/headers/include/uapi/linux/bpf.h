/* SPDX-License-Identifier: MIT */
/* BCC brings its own. */
#include <linux/types.h>
