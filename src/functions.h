/*-------------------------------------------------------------------------
 *
 * functions.h
 *	  What SQL functions have in common.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_FUNCTIONS_H
#define STATBUFFER_FUNCTIONS_H

#include "buffer.h"
#include "fmgr.h"
#include "nodes/parsenodes.h"

/* The buffer that an argument says; raises an error when there is none. */
extern Oid	function_buffer_argument(FunctionCallInfo fcinfo, int argno);

/* Raise PostgreSQL's own errors when the user lacks a privilege. */
extern void function_check_privilege(Oid relid, AclMode mode);
extern void function_check_owner(Oid relid);

/*
 * Lock a buffer, to the end of the transaction, to increment in it.  The
 * caller has just called AcceptInvalidationMessages(), so that privileges that
 * were revoked are gone.  Raises the errors of function_check_privilege() and
 * pending_open().
 */
extern SbBuffer *function_open_for_increment(Oid relid);

#endif							/* STATBUFFER_FUNCTIONS_H */
