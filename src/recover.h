#ifndef STATBUFFER_RECOVER_H
#define STATBUFFER_RECOVER_H
/* replaced by the room */
static inline void
recover_buffer(Oid relid)
{
}
#endif
