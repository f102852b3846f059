/* SPDX-License-Identifier: MIT */
/*
 * Takes pages out of a pipe by io_uring, one each time, after something has happened to them.
 *
 *   ring_pipe TAKE MODE COUNT FILE
 *
 * TAKE is read, readv or splice (to /dev/null). MODE says what the page is: of memory (vmspliced,
 * changed, gift, unmapped), written to the pipe (write), or FILE's, by splice(2) (truncated,
 * written, kept) or by io_uring (ring-written, ring-kept). Exit status 77: there is no io_uring.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096

static struct io_uring ring;
static int ends[2], null, file;
static char page[PAGE];

static void submit(struct io_uring_sqe *sqe)
{
	struct io_uring_cqe *cqe;

	(void)sqe;
	if (io_uring_submit_and_wait(&ring, 1) != 1 || io_uring_wait_cqe(&ring, &cqe))
		err(1, "io_uring_submit_and_wait");
	if (cqe->res != PAGE)
		errx(1, "a request returned %d", cqe->res);
	io_uring_cqe_seen(&ring, cqe);
}

static void take(const char *how)
{
	struct iovec whole = {page, PAGE};
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

	if (!strcmp(how, "read"))
		io_uring_prep_read(sqe, ends[0], page, PAGE, (__u64)-1);
	else if (!strcmp(how, "readv"))
		io_uring_prep_readv(sqe, ends[0], &whole, 1, (__u64)-1);
	else
		io_uring_prep_splice(sqe, ends[0], -1, null, -1, PAGE, 0);
	submit(sqe);
}

static void queue_memory(char *memory, unsigned int flags)
{
	struct iovec whole = {memory, PAGE};

	memset(memory, 'm', PAGE);
	if (vmsplice(ends[1], &whole, 1, flags) != PAGE)
		err(1, "vmsplice");
}

static void queue_file(int by_ring)
{
	struct io_uring_sqe *sqe;
	loff_t start = 0;

	if (by_ring) {
		sqe = io_uring_get_sqe(&ring);
		io_uring_prep_splice(sqe, file, 0, ends[1], -1, PAGE, 0);
		submit(sqe);
	} else if (splice(file, &start, ends[1], NULL, PAGE, 0) != PAGE) {
		err(1, "splice");
	}
}

static void fill_file(char byte)
{
	memset(page, byte, PAGE);
	if (pwrite(file, page, PAGE, 0) != PAGE)
		err(1, "pwrite");
}

/* Returns memory to be unmapped afterwards, if any. */
static char *prepare(const char *mode, int i)
{
	char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		err(1, "mmap");
	if (!strcmp(mode, "vmspliced")) {
		queue_memory(memory, 0);
	} else if (!strcmp(mode, "gift")) {
		queue_memory(memory, SPLICE_F_GIFT);
	} else if (!strcmp(mode, "changed")) {
		queue_memory(memory, 0);
		memory[i] = 'c';
	} else if (!strcmp(mode, "unmapped")) {
		queue_memory(memory, SPLICE_F_GIFT);
		munmap(memory, PAGE);
		memory = NULL;
	} else if (!strcmp(mode, "write")) {
		if (write(ends[1], memory, PAGE) != PAGE)
			err(1, "write");
	} else {
		fill_file('f');
		queue_file(!strncmp(mode, "ring-", 5));
		if (strstr(mode, "written"))
			fill_file('w');
		if (!strcmp(mode, "truncated") && ftruncate(file, 0))
			err(1, "ftruncate");
	}
	return memory;
}

int main(int argc, char **argv)
{
	int count = argc == 5 ? atoi(argv[3]) : 0;

	if (argc != 5)
		return 2;
	if (io_uring_queue_init(8, &ring, 0))
		return 77;
	file = open(argv[4], O_RDWR | O_CREAT | O_TRUNC, 0600);
	null = open("/dev/null", O_WRONLY);
	if (file < 0 || null < 0 || pipe(ends))
		err(1, "open");
	for (int i = 0; i < count; i++) {
		char *memory = prepare(argv[2], i);

		take(argv[1]);
		if (memory)
			munmap(memory, PAGE);
	}
	return 0;
}
