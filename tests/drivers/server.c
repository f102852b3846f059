// SPDX-License-Identifier: MIT
/* What the servers of the tests have in common: their command line, and how FUSE is mounted. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <unistd.h>

#define DEADLINE 30 /* seconds: a lost request must not hang a test */

static __attribute__((noreturn)) void misused(bool has_tail)
{
	fprintf(stderr, "usage: %s MODE [-n PAGES]%s [-d DIRECTORY] [-o REPORT]\n",
		program_invocation_short_name, has_tail ? " [-t TAIL_BYTES]" : "");
	exit(2);
}

const void *server_mode(int argc, char **argv, const void *modes, size_t nr, size_t size,
			size_t tail, struct options *options)
{
	const char *const *name = modes;
	bool has_tail = tail;
	size_t pages = 23;
	int option;

	if (argc < 2)
		misused(has_tail);
	while (nr && strcmp(*name, argv[1])) {
		name = (const void *)((const char *)name + size);
		nr--;
	}
	if (!nr)
		misused(has_tail);
	*options = (struct options){.count = 1, .directory = "."};
	optind = 2;
	while ((option = getopt(argc, argv, has_tail ? "n:d:o:t:" : "n:d:o:")) != -1) {
		switch (option) {
		case 'n':
			pages = strtoul(optarg, NULL, 0);
			break;
		case 't':
			tail = strtoul(optarg, NULL, 0);
			break;
		case 'd':
			options->directory = optarg;
			break;
		case 'o':
			options->output = optarg;
			break;
		default:
			misused(has_tail);
		}
	}
	options->size = pages * PAGE + tail;
	alarm(DEADLINE);
	prctl(PR_SET_NAME, *name, 0, 0, 0);
	return name;
}

void mount_fuse(int device, const char *directory)
{
	char settings[64];

	snprintf(settings, sizeof(settings), "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		unsupported("a mount namespace");
	if (mount(program_invocation_short_name, directory, "fuse", MS_NOSUID | MS_NODEV,
		  settings) < 0)
		unsupported("mounting a FUSE file system");
}
