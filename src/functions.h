/*-------------------------------------------------------------------------
 *
 * functions.h
 *	  Helpers shared by the files with SQL functions.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_FUNCTIONS_H
#define STATBUFFER_FUNCTIONS_H

#include "fmgr.h"

/* the name of the default buffer, in the extension's schema */
#define DEFAULT_BUFFER		"sb_default"

extern Oid	function_default_buffer(FunctionCallInfo fcinfo);
extern Oid	function_find_buffer(FunctionCallInfo fcinfo, int argno);
extern Oid	function_buffer_argument(FunctionCallInfo fcinfo, int argno);
extern void function_check_not_standby(void);

#endif							/* STATBUFFER_FUNCTIONS_H */
