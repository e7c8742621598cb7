/*-------------------------------------------------------------------------
 *
 * convert.h
 *	  Converting the keys that a buffer holds when its key columns are altered.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_CONVERT_H
#define STATBUFFER_CONVERT_H

#include "buffer.h"

/* Called for a key that cannot be converted, with the reason. */
typedef void (*ConvertFailed) (SharedCounter *counter, const char *message,
							   void *arg);

/* What has become of the keys of older shapes. */
typedef struct ConvertResult
{
	uint64		nfailed;
	char	   *message;		/* why the first one failed, or NULL */
} ConvertResult;

extern void convert_init(void);
extern void convert_altered(SbBuffer *buffer, ConvertResult *result);
extern void convert_rest(SbBuffer *buffer, BufferLocker lock,
						 ConvertFailed failed, void *arg,
						 ConvertResult *result);

#endif							/* STATBUFFER_CONVERT_H */
