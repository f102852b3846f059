// SPDX-License-Identifier: MIT
/*
 * A 32-bit process: reads 23 times 4096 bytes from standard input.
 *
 * Freestanding, so that the compiler's -m32 is all it takes to build it.
 */
#define COUNT	23
#define SIZE	4096
#define NR_EXIT 1
#define NR_READ 3

static char data[SIZE];

static long call(long number, long a, void *b, long c)
{
	long result;

	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(number), "b"(a), "c"(b), "d"(c)
			 : "memory");
	return result;
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
	int status = 0;

	for (int i = 0; i < COUNT; i++)
		if (call(NR_READ, 0, data, SIZE) != SIZE)
			status = 1;
	for (;;)
		call(NR_EXIT, status, 0, 0);
}
