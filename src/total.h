/*-------------------------------------------------------------------------
 *
 * total.h
 *	  What is stored for a key and what is counted, together.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_TOTAL_H
#define STATBUFFER_TOTAL_H

#include "buffer.h"

extern void total_check_target(SbBuffer *buffer);
extern int64 total_read(SbBuffer *buffer, const BufferShape *shape,
						const KeyBytes *key);
extern int64 total_read_counted(SbBuffer *buffer, const BufferShape *shape,
								const KeyBytes *key);

#endif							/* STATBUFFER_TOTAL_H */
