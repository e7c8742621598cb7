/*-------------------------------------------------------------------------
 *
 * probe.c
 *	  What dev/bench needs inside the server: a function that does nothing,
 *	  which is the least that a call of a C function costs; the account that
 *	  dsa.c gives of the memory of all counters; and where callgrind begins
 *	  and ends to count instructions.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <dlfcn.h>

#include "fmgr.h"
#include "utils/dsa.h"

#ifdef USE_CALLGRIND
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_START_INSTRUMENTATION
#define CALLGRIND_ZERO_STATS
#define CALLGRIND_DUMP_STATS
#define CALLGRIND_STOP_INSTRUMENTATION
#endif

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(noop);
PG_FUNCTION_INFO_V1(can_dump_area);
PG_FUNCTION_INFO_V1(dump_area);
PG_FUNCTION_INFO_V1(callgrind_start);
PG_FUNCTION_INFO_V1(callgrind_stop);

Datum
noop(PG_FUNCTION_ARGS)
{
	PG_RETURN_VOID();
}

/*
 * The area is found by the name of the variable that has it: this library must
 * load, too, where statbuffer hides it.
 */
static dsa_area *
find_area(void)
{
	dsa_area  **area = dlsym(RTLD_DEFAULT, "shared_area");

	return area != NULL ? *area : NULL;
}

/* The session must have used a buffer. */
Datum
can_dump_area(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(find_area() != NULL);
}

/* Prints to standard error, which is the server's log. */
Datum
dump_area(PG_FUNCTION_ARGS)
{
	dsa_dump(find_area());
	PG_RETURN_VOID();
}

Datum
callgrind_start(PG_FUNCTION_ARGS)
{
	CALLGRIND_START_INSTRUMENTATION;
	CALLGRIND_ZERO_STATS;
	PG_RETURN_VOID();
}

/* What was counted since the start goes to a file. */
Datum
callgrind_stop(PG_FUNCTION_ARGS)
{
	CALLGRIND_DUMP_STATS;
	CALLGRIND_STOP_INSTRUMENTATION;
	PG_RETURN_VOID();
}
