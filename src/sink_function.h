/*-------------------------------------------------------------------------
 *
 * sink_function.h
 *	  The user's function that stores counts.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SINK_FUNCTION_H
#define STATBUFFER_SINK_FUNCTION_H

#include "access/tupdesc.h"

extern Oid	handler_find(const char *name, TupleDesc desc, bool *takes_arrays);

#endif							/* STATBUFFER_SINK_FUNCTION_H */
