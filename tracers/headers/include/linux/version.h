/* SPDX-License-Identifier: MIT */
/*
 * BCC asks for a version to choose among its own declarations; the kernel that runs is known
 * by its BTF, and kernels since 5.0 ignore the version that a program was made for.
 */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 10, 0)
