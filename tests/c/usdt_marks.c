/* SPDX-License-Identifier: MIT */
/*
 * Fires the probes of csrc/probes.h known numbers of times, with known values: COUNT calls in each
 * of THREADS threads of each of PROCESSES processes, which stand side by side.
 *
 *   usdt_marks COUNT THREADS PROCESSES [FILE]
 *
 * In each call 101 bytes of FILE are read, and after it 211.
 */
#include "probes.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *file;
static int count;

static void read_bytes(int fd, size_t size)
{
	char buffer[256];

	if (fd >= 0 && pread(fd, buffer, size, 0) != (ssize_t)size)
		exit(1);
}

static void *call(void *unused)
{
	int fd = file ? open(file, O_RDONLY) : -1;
	/* Arguments in all the places that a compiler may put them. */
	volatile int64_t in_memory = 4099;
	int64_t i;

	if (file && fd < 0)
		exit(1);
	for (i = 1; i <= count; i++) {
		rsplice_probe_reserve(i, 3, 4, in_memory + 1);
		read_bytes(fd, 101);
		rsplice_probe_fill(i, in_memory, RSPLICE_HOW_DIRECT);
		rsplice_probe_fill(i, 7, RSPLICE_HOW_REFERENCE);
		rsplice_probe_fill(i, i, RSPLICE_HOW_COPY);
		rsplice_probe_fill(i, 11, RSPLICE_HOW_GENERATED);
		rsplice_probe_fallback(i, 13, 0x04);
		rsplice_probe_fallback(i, 17, 0x0a);
		/* Of part of the call: it goes on. */
		rsplice_probe_abort(i, 19);
		read_bytes(fd, 101);
		rsplice_probe_publish(i, 23, 29, 31, 37, i);
		read_bytes(fd, 211);
		/* Another call, that comes to nothing. */
		rsplice_probe_reserve(i, 3, 4, 41);
		read_bytes(fd, 101);
		rsplice_probe_abort(i, 41);
		read_bytes(fd, 211);
	}
	return unused;
}

int main(int argc, char **argv)
{
	int threads, processes, status = 0, i;
	pthread_t thread[64];

	if (argc < 4)
		return 2;
	count = atoi(argv[1]);
	threads = atoi(argv[2]);
	processes = atoi(argv[3]);
	file = argv[4];
	if (threads > 64)
		return 2;
	for (i = 1; i < processes && fork(); i++)
		;
	for (i = 1; i < threads; i++) {
		if (pthread_create(&thread[i], NULL, call, NULL))
			return 1;
	}
	call(NULL);
	for (i = 1; i < threads; i++)
		pthread_join(thread[i], NULL);
	while (wait(&status) > 0) {
		if (status)
			return 1;
	}
	return 0;
}
