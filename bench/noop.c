/*-------------------------------------------------------------------------
 *
 * noop.c
 *	  A function that does nothing: the least that a call of a C function
 *	  costs, for dev/bench to compare with.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(noop);

Datum
noop(PG_FUNCTION_ARGS)
{
	PG_RETURN_VOID();
}
