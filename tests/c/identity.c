/* SPDX-License-Identifier: MIT */
/*
 * A file in memory is filled in place: the frames that hold its pages before the call hold them
 * after it, of 4 KiB pages and of huge ones. /proc/self/pagemap tells frames to root alone.
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (2 * MIB)
#define NR   (SIZE / PAGE)

static void frames_of(const uint8_t *memory, uint64_t *frames)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	size_t i;

	CHECK(fd >= 0);
	for (i = 0; i < NR; i++) {
		/* It has to be in the page table to be told. */
		(void)*(const volatile uint8_t *)(memory + i * PAGE);
		CHECK_EQUAL(pread(fd, &frames[i], 8, (off_t)((uintptr_t)memory / PAGE + i) * 8), 8);
		CHECK(frames[i] >> 63);
		frames[i] &= (1ULL << 55) - 1;
	}
	close(fd);
	if (!frames[0])
		skip("the frames of /proc/self/pagemap are for root");
}

static int disk_file(void)
{
	static uint8_t bytes[SIZE];
	int fd = scratch_file(0);
	size_t i;

	for (i = 0; i < SIZE; i++)
		bytes[i] = pattern(i);
	CHECK_EQUAL(write(fd, bytes, SIZE), SIZE);
	CHECK(!fsync(fd));
	CHECK(!lseek(fd, 0, SEEK_SET));
	return fd;
}

static void fill(const char *name, int memory, int advice)
{
	static uint64_t before[NR], after[NR];
	struct rsplice_result result;
	int source = disk_file();
	uint8_t *bytes;
	size_t i;

	about("%s", name);
	CHECK(memory >= 0);
	if (ftruncate(memory, SIZE) || fallocate(memory, 0, 0, SIZE)) {
		printf("lacking: %s\n", name);
		close(memory), close(source);
		return;
	}
	bytes = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	CHECK(bytes != MAP_FAILED);
	if (advice && madvise(bytes, SIZE, advice))
		printf("lacking: %s\n", name);
	frames_of(bytes, before);
	CHECK_EQUAL(rsplice(source, NULL, memory, NULL, SIZE, 0, &result), SIZE);
	CHECK_EQUAL(result.direct + result.unknown, SIZE);
	frames_of(bytes, after);
	for (i = 0; i < NR; i++)
		CHECK_EQUAL(after[i], before[i]);
	for (i = 0; i < SIZE; i++)
		CHECK_EQUAL(bytes[i], pattern(i));
	munmap(bytes, SIZE);
	close(memory), close(source);
}

int main(int argc, char **argv)
{
	use_directory(argc, argv);
	limit_seconds(30);
	fill("a memfd", memfd_create("m", MFD_CLOEXEC), 0);
	fill("a memfd with transparent huge pages", memfd_create("m", MFD_CLOEXEC), MADV_HUGEPAGE);
	fill("a file on tmpfs", open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), 0);
	fill("a memfd of 2 MiB pages (vm.nr_hugepages)",
	     memfd_create("m", MFD_CLOEXEC | MFD_HUGETLB), 0);
	return 0;
}
