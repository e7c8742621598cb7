# A process cannot map a segment of shared memory, as when it has too many files
# open, just when it asks for a flush.  The flush fails, and nothing else: the key
# can be flushed again, and is freed, and no error comes after a commit.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;

plan skip_all => 'needs a compiler and the headers of the server' if !can_build_library();

my $db = 'postgres';

# While this file is there, segments that exist cannot be opened.
my $fails = PostgreSQL::Test::Utils::tempdir . '/fails';
my $shim = build_library('shm_shim', qq{
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
int
shm_open(const char *name, int flags, mode_t mode)
{
	int (*next) (const char *, int, mode_t) = dlsym(RTLD_NEXT, "shm_open");
	if ((flags & O_CREAT) == 0 && access("$fails", F_OK) == 0)
	{
		errno = EMFILE;
		return -1;
	}
	return next(name, flags, mode);
}
});

my $node;
{
	local $ENV{LD_PRELOAD} = $shim;
	local $ENV{ASAN_OPTIONS} = "$ENV{ASAN_OPTIONS}:verify_asan_link_order=0" if $ENV{ASAN_OPTIONS};
	$node = new_node('mapping', 'dynamic_shared_memory_type = posix');
}

# In a session, do something while nothing can be mapped; returns the errors.
sub fail_to
{
	my ($session, $statement) = @_;

	append_to_file($fails, '');
	$session->{stderr} = '';
	$session->query($statement);
	unlink $fails or die "could not remove $fails: $!";
	my $errors = $session->{stderr};
	$session->{stderr} = '';
	return $errors;
}

# Requests that wait: their worker is busy.  They are in the first segment, and
# then others are filled, so that new requests come from memory that sessions
# which only look at another buffer have not mapped.
make_buffer($node, $db, 'big', q{interval '1h', timeout '1h'});
make_buffer($node, $db, 'small', q{interval '1h', timeout '100ms'});
make_buffer($node, $db, 'new', q{interval '1h', timeout '100ms'});
sql(q{SELECT sb_increment('n', 1, 'small')});
sql(q{INSERT INTO big SELECT 'x' || g FROM generate_series(1, 20000) g});
my $gate = close_gate($node, $db);
sql(q{SELECT sb_flush('x1', 'big')});
wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'big'}, 'the worker is busy');
sql(qq{SELECT sb_flush('x$_', 'big')}) foreach 2 .. 4;
sql(q{INSERT INTO big SELECT 'x' || g FROM generate_series(20001, 120000) g});

# --- sb_flush() ---------------------------------------------------------------

my $session = $node->background_psql($db, on_error_stop => 0);
$session->query_safe(q{SELECT sb_count('n', 'small')});
like(fail_to($session, q{SELECT sb_flush('n', 'small')}), qr/could not open shared memory segment/,
	'a flush cannot be asked for');
open_gate($gate);
$session->quit;

# another session: since 17 one cannot map what it has failed to map before
sql(q{SELECT sb_flush('n', 'small')});
wait_for_stored($node, $db, 'small', 1, 'the next time it can, and the key is flushed');
wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'small'}, 'and freed');

# --- a transaction that has asked for a flush of what it has counted ----------

$gate = close_gate($node, $db);
sql(q{SELECT sb_flush('x5', 'big')});
wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'big'}, 'the worker is busy again');
sql(qq{SELECT sb_flush('x$_', 'big')}) foreach 6 .. 8;
sql(q{CREATE TABLE written (a int)});
$session = $node->background_psql($db, on_error_stop => 0);
$session->query_safe(q{SELECT count(*) FROM sb_stat_buffers});
$session->query_safe(q{BEGIN; INSERT INTO written VALUES (1); SELECT sb_increment('n', 1, 'new'), sb_flush('n', 'new')});
like(fail_to($session, 'COMMIT'), qr/ERROR:  could not open shared memory segment/, 'a commit fails');
$session->quit;
is(sql('SELECT count(*) FROM written'), 0, 'and is rolled back');
sql(q{BEGIN; INSERT INTO written VALUES (1); SELECT sb_increment('n', 1, 'new'), sb_flush('n', 'new'); COMMIT});
open_gate($gate);
wait_for_stored($node, $db, 'new', 1, 'the next one succeeds');
is(sql('SELECT count(*) FROM written'), 1, 'with all that it did');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
