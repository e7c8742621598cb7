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
PG_FUNCTION_INFO_V1(dump_area);
PG_FUNCTION_INFO_V1(callgrind_start);
PG_FUNCTION_INFO_V1(callgrind_stop);

Datum
noop(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(1);
}

/*
 * dump_area(distance bigint): have dsa.c print its account.  The variable that
 * has the area is not exported, so the caller says how far it is from what is:
 * the launcher's main function.  The session must have used a buffer.
 *
 * Prints to standard error, which is the server's log.
 */
Datum
dump_area(PG_FUNCTION_ARGS)
{
	char	   *known = dlsym(RTLD_DEFAULT, "statbuffer_launcher_main");

	if (known == NULL)
		elog(ERROR, "the session has not loaded statbuffer");
	dsa_dump(*(dsa_area **) (known + PG_GETARG_INT64(0)));
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
