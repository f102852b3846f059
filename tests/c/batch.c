/* SPDX-License-Identifier: MIT */
/*
 * rsplice_batch(): every request as a call of its own would be, good ones beside bad ones, and with
 * a fault at each call that the library makes.
 */
#define _GNU_SOURCE
#include "check.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NR   40 /* more than one group */
#define SIZE (5 * PAGE + 100)

static struct origin origins[NR];
static struct rsplice_request requests[NR];
static int64_t begins[NR];

/* Of a file in the middle, at its end, unaligned, behind its end; of /dev/zero; and bad ones. */
static void prepare(void)
{
	static const int64_t from[] = {0, 512, 511, SIZE - 100, SIZE, 2 * SIZE};
	static const enum origin_kind kinds[] = {ORIGIN_DIRECT, ORIGIN_BUFFERED, ORIGIN_TMPFS,
						 ORIGIN_ZERO, ORIGIN_PIPE};
	int i;

	for (i = 0; i < NR; i++) {
		CHECK(!origin_open(&origins[i], kinds[i % 5], SIZE));
		begins[i] = origins[i].seekable ? from[i % 6] : 0;
		requests[i] =
			(struct rsplice_request){.fd_in = i % 13 == 12 ? -1 : origins[i].fd,
						 .fd_out = memfd_create("batch", MFD_CLOEXEC),
						 .off_in = origins[i].seekable ? begins[i] : -1,
						 .off_out = i % 2 ? 100 * (i % 3) : -1,
						 .len = i % 4 ? 3 * PAGE : 2 * SIZE};
	}
}

static void check_bytes(int i)
{
	struct rsplice_request *request = &requests[i];
	size_t start = i % 2 ? 100 * (size_t)(i % 3) : 0, done = (size_t)request->ret, at;
	uint8_t bytes[2 * SIZE];
	struct stat status;

	CHECK_EQUAL(pread(request->fd_out, bytes, done, (off_t)start), done);
	for (at = 0; at < done; at++)
		CHECK_EQUAL(bytes[at], origin_byte(&origins[i], (size_t)begins[i] + at));
	CHECK(!fstat(request->fd_out, &status));
	CHECK_EQUAL(status.st_size, done ? start + done : 0);
	if (i % 2)
		CHECK_EQUAL(request->off_out, start + done);
	if (origins[i].seekable)
		CHECK_EQUAL(request->off_in, begins[i] + (int64_t)done);
}

static void check_request(int i, bool faulty)
{
	const struct rsplice_result *result = &requests[i].result;
	size_t left = begins[i] < SIZE ? (size_t)(SIZE - begins[i]) : 0;
	struct stat status;

	if (requests[i].ret < 0) {
		CHECK(faulty || (i % 13 == 12 && requests[i].ret == -EBADF));
		CHECK_EQUAL(requests[i].off_in, origins[i].seekable ? begins[i] : -1);
		CHECK(!fstat(requests[i].fd_out, &status) && !status.st_size);
		return;
	}
	CHECK_EQUAL(result->moved + result->shared + result->direct + result->copied +
			    result->unknown,
		    requests[i].ret);
	if (!faulty && origins[i].kind != ORIGIN_PIPE && origins[i].kind != ORIGIN_ZERO)
		CHECK_EQUAL(requests[i].ret, left < requests[i].len ? left : requests[i].len);
	check_bytes(i);
}

/* Whether the fault was met. */
static bool run(const struct fault *fault)
{
	bool met;
	int i, good, counted = 0;

	prepare();
	shim_arm(fault);
	shim_enter();
	good = rsplice_batch(requests, NR, 0);
	shim_leave();
	met = shim_struck();
	shim_disarm();
	for (i = 0; i < NR; i++) {
		about("request %d, fault %d at %lu: %s", i, fault->kind, fault->at, shim_victim());
		counted += requests[i].ret >= 0;
		check_request(i, met);
		rsplice_discard(origins[i].fd);
		origin_close(&origins[i]);
		close(requests[i].fd_out);
	}
	CHECK_EQUAL(good, counted);
	return met;
}

int main(int argc, char **argv)
{
	static const int errors[] = {EINTR, ENOMEM, EIO};
	unsigned long every = argc > 2 ? strtoul(argv[2], NULL, 10) : 1, tried = 0;
	struct fault fault = {.kind = FAULT_NONE};
	unsigned int before;
	size_t i;

	use_directory(argc, argv);
	limit_seconds(100);
	run(&fault);
	before = descriptors();
	CHECK(!run(&fault));
	for (i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		fault = (struct fault){.kind = FAULT_ERROR, .at = 1, .error = errors[i]};
		for (; run(&fault); fault.at += every, tried++)
			CHECK(descriptors() <= before);
	}
	for (fault = (struct fault){.kind = FAULT_HALF, .at = 1}; run(&fault); fault.at += every)
		tried++;
	CHECK(descriptors() <= before);
	printf("%lu faults\n", tried);
	return 0;
}
