/* SPDX-License-Identifier: MIT */
/*
 * Faults in the calls that librsplice makes. The linker's --wrap puts shim.c between the library
 * and libc, for the functions that WRAPPED in the Makefile names; calls of the tests themselves
 * pass through it unharmed, since faults strike only between shim_enter() and shim_leave().
 */
#ifndef SHIM_H
#define SHIM_H

#include <stdbool.h>

enum fault_kind {
	FAULT_NONE,
	FAULT_ERROR, /* the call is not made, and fails with an errno */
	FAULT_ONE,   /* a transfer moves one byte */
	FAULT_HALF,  /* or half of what was asked for */
	FAULT_EVENT, /* something happens before the call, which is then made: shim_event() */
};

struct fault {
	enum fault_kind kind;
	unsigned long at; /* the first call that it strikes: 1, 2, ... */
	bool persists;	  /* and all after it */
	int error;
};

void shim_arm(const struct fault *fault);
void shim_disarm(void);
void shim_event(void (*event)(void));
void shim_enter(void);
void shim_leave(void);
/* Both, for around_calls of check.h. */
void shim_around(bool before);
/*
 * Transfers from `source` and into `consumer` are never cut short: a message is received whole or
 * lost in part, and /dev/fuse takes a reply or none of it. -1: no such.
 */
void shim_spare(int source, int consumer);
/* How often it has struck since it was armed. */
unsigned long shim_struck(void);
/* The function and the descriptor that it struck last, and the descriptor written to, or -1. */
const char *shim_victim(void);
int shim_victim_fd(void);

#endif /* SHIM_H */
