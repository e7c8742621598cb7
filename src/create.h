/*-------------------------------------------------------------------------
 *
 * create.h
 *	  Creating buffers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_CREATE_H
#define STATBUFFER_CREATE_H

#include "fmgr.h"

extern Oid	create_default_buffer(FunctionCallInfo fcinfo);

#endif							/* STATBUFFER_CREATE_H */
