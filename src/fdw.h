/*-------------------------------------------------------------------------
 *
 * fdw.h
 *	  The foreign table.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_FDW_H
#define STATBUFFER_FDW_H

#include "nodes/execnodes.h"
#include "utils/relcache.h"

extern bool fdw_others_used(EState *estate);

#endif							/* STATBUFFER_FDW_H */
