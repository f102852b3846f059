/* SPDX-License-Identifier: MIT */
/*
 * No earlier content of a page can be seen beyond a short fill. Free memory is filled with a
 * pattern first, which is then looked for.
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define POISON	     0x6b
#define POISON_BYTES (32u * MIB)

/* Freed pages are handed out again first: those of anonymous memory, and of the page cache. */
static void poison(void)
{
	char *memory = mmap(NULL, POISON_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	int file = memfd_create("poison", MFD_CLOEXEC);

	CHECK(memory != MAP_FAILED && file >= 0);
	memset(memory, POISON, POISON_BYTES);
	CHECK_EQUAL(write(file, memory, POISON_BYTES / 4), POISON_BYTES / 4);
	close(file);
	munmap(memory, POISON_BYTES);
}

/* Whether the poison would be found at all: memory that nobody clears would show it. */
static bool is_poison(const uint8_t *bytes, size_t size)
{
	size_t i, found = 0;

	for (i = 0; i < size; i++)
		found += bytes[i] == POISON;
	return found > 8 && found == size;
}

static void check_zeros(const uint8_t *bytes, size_t size)
{
	size_t i;

	CHECK(!is_poison(bytes, size));
	for (i = 0; i < size; i++)
		CHECK_EQUAL(bytes[i], 0);
}

/* A file whose last block, on the disk, ends in poison: it was longer once. */
static int cut_file(size_t size)
{
	uint8_t *bytes = malloc(64 * KIB);
	int fd = scratch_file(0);
	size_t i;

	CHECK(bytes);
	memset(bytes, POISON, 64 * KIB);
	CHECK_EQUAL(write(fd, bytes, 64 * KIB), 64 * KIB);
	CHECK(!fsync(fd));
	for (i = 0; i < size; i++)
		bytes[i] = pattern(i);
	CHECK_EQUAL(pwrite(fd, bytes, size, 0), size);
	CHECK(!ftruncate(fd, (off_t)size) && !fsync(fd));
	free(bytes);
	return fd;
}

static int queue_of(size_t size)
{
	uint8_t bytes[64 * KIB];
	int pair[2];
	size_t i;

	for (i = 0; i < size; i++)
		bytes[i] = pattern(i);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK_EQUAL(write(pair[1], bytes, size), size);
	close(pair[1]);
	return pair[0];
}

/* The whole of the last page can be mapped, also behind the file's end. */
static void check_memory(int memory, size_t start, size_t size, size_t page)
{
	size_t span = (start + size + page - 1) / page * page, i;
	uint8_t *bytes = mmap(NULL, span, PROT_READ, MAP_SHARED, memory, 0);

	CHECK(bytes != MAP_FAILED);
	check_zeros(bytes, start);
	for (i = 0; i < size; i++)
		CHECK_EQUAL(bytes[start + i], pattern(i));
	check_zeros(bytes + start + size, span - start - size);
	munmap(bytes, span);
}

static void into_memory(bool from_socket, unsigned int kind, const char *tmpfs, size_t size)
{
	size_t page = kind & MFD_HUGETLB ? 2 * MIB : PAGE;
	int memory = tmpfs ? open(tmpfs, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)
			   : memfd_create("sink", MFD_CLOEXEC | kind);
	int source = from_socket ? queue_of(size) : cut_file(size);
	int64_t out = 100;
	ssize_t done;

	about("%zu bytes of a %s into a %s", size, from_socket ? "socket" : "file",
	      kind    ? "hugetlb memfd"
	      : tmpfs ? "tmpfs file"
		      : "memfd");
	CHECK(memory >= 0);
	CHECK(from_socket || !lseek(source, 0, SEEK_SET));
	poison();
	done = rsplice(source, NULL, memory, &out, 1 * MIB, 0, NULL);
	if (done < 0 && kind && (errno == ENOSPC || errno == ENOMEM)) {
		printf("lacking: huge pages (vm.nr_hugepages)\n");
	} else {
		CHECK_EQUAL(done, size);
		check_memory(memory, 100, size, page);
	}
	close(memory), close(source);
	/* At the start of a page, where the device fills it. */
	memory = memfd_create("sink", MFD_CLOEXEC | kind);
	source = cut_file(size);
	CHECK(!lseek(source, 0, SEEK_SET));
	poison();
	done = rsplice(source, NULL, memory, NULL, 1 * MIB, 0, NULL);
	CHECK(done == (ssize_t)size || (kind && done < 0));
	if (done > 0)
		check_memory(memory, 0, size, page);
	close(memory), close(source);
}

/* Of a pipe the bytes alone can be read; nothing more may come than was said. */
static void into_pipe(bool from_socket, size_t size)
{
	int source = from_socket ? queue_of(size) : cut_file(size), ends[2];
	uint8_t *bytes = malloc(2 * MIB);
	size_t i;

	about("%zu bytes of a %s into a pipe", size, from_socket ? "socket" : "file");
	CHECK(bytes && !pipe2(ends, O_CLOEXEC | O_NONBLOCK));
	CHECK(fcntl(ends[1], F_SETPIPE_SZ, MIB) == MIB);
	CHECK(from_socket || !lseek(source, 0, SEEK_SET));
	poison();
	CHECK_EQUAL(rsplice(source, NULL, ends[1], NULL, MIB, 0, NULL), size);
	CHECK_EQUAL(read(ends[0], bytes, 2 * MIB), size);
	for (i = 0; i < size; i++)
		CHECK_EQUAL(bytes[i], pattern(i));
	free(bytes);
	close(ends[0]), close(ends[1]), close(source);
}

int main(int argc, char **argv)
{
	static const size_t sizes[] = {1, 511, 513, 5000, 20000};
	size_t i;

	use_directory(argc, argv);
	limit_seconds(60);
	about("the check itself");
	{
		uint8_t bytes[64];

		memset(bytes, POISON, sizeof(bytes));
		CHECK(is_poison(bytes, sizeof(bytes)));
	}
	for (i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		into_memory(false, 0, NULL, sizes[i]);
		into_memory(true, 0, NULL, sizes[i]);
		into_memory(false, 0, "/dev/shm", sizes[i]);
		into_pipe(false, sizes[i]);
		into_pipe(true, sizes[i]);
	}
	into_memory(false, MFD_HUGETLB, NULL, 5000);
	into_memory(true, MFD_HUGETLB, NULL, 5000);
	return 0;
}
