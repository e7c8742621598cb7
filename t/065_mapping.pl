# A process cannot map a segment of shared memory, as when it has too many files
# open, just when it asks for a flush.  The flush fails, and nothing else: the key
# can be flushed again, and is freed, and no error comes after a commit.  Or when it
# moves keys: then another process does it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;
use Time::HiRes qw(usleep);
use WasteTest;

plan skip_all => 'needs a compiler and the headers of the server' if !can_build_library();

my $db = 'postgres';

# While this file is there, segments that exist cannot be opened, and which process
# could not open one is told by a file with its ID.  The names of those that are
# made are noted.
my $dir = PostgreSQL::Test::Utils::tempdir;
my $fails = "$dir/fails";
my $shim = build_library('shm_shim', qq{
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int
shm_open(const char *name, int flags, mode_t mode)
{
	int (*next) (const char *, int, mode_t) = dlsym(RTLD_NEXT, "shm_open");
	char path[1024];
	if ((flags & O_CREAT) == 0 && access("$fails", F_OK) == 0)
	{
		snprintf(path, sizeof(path), "$dir/%d", (int) getpid());
		close(open(path, O_CREAT | O_WRONLY, 0600));
		errno = EMFILE;
		return -1;
	}
	if ((flags & O_CREAT) != 0)
	{
		int file = open("$dir/names", O_CREAT | O_WRONLY | O_APPEND, 0600);
		dprintf(file, "%s\\n", name);
		close(file);
	}
	return next(name, flags, mode);
}
});

sub node_with_shim
{
	local $ENV{LD_PRELOAD} = $shim;
	local $ENV{ASAN_OPTIONS} = "$ENV{ASAN_OPTIONS}:verify_asan_link_order=0" if $ENV{ASAN_OPTIONS};
	return new_node(@_, 'dynamic_shared_memory_type = posix');
}

my $node = node_with_shim('mapping');

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

# --- the launcher and a worker that move keys -----------------------------------

# Each has mapped nothing of what it is to move, or where it is to go.  A process
# may never be able to map what it has failed to map once, so others take their
# places.
my $stay = 30_000;
unlink "$dir/names";
$node = node_with_shim('moving', q{shared_preload_libraries = 'statbuffer'});
make_summing_buffer($node, $_, q{interval '1h', timeout '1h', batch_size '100000', shutdown '0'}) foreach qw(busy halted gone);
sql(qq{
	INSERT INTO halted_bad VALUES ('it is stopped');
	CREATE PROCEDURE fill() LANGUAGE plpgsql AS \$\$
	BEGIN
		FOR i IN 1 .. 30 LOOP
			INSERT INTO gone SELECT 'key ' || g FROM generate_series(10000 * i - 9999, 10000 * i) g;
			INSERT INTO busy SELECT 'key ' || g FROM generate_series(1000 * i - 999, 1000 * i) g;
			INSERT INTO halted SELECT 'key ' || g FROM generate_series(1000 * i - 999, 1000 * i) g;
			COMMIT;
		END LOOP;
	END \$\$;
	CALL fill();
	SELECT sb_stop('halted')});
start_worker($node, 'busy');
my @old = (processes($node, 'statbuffer launcher'), worker_of($node, $db, 'busy'));
is(@old, 2, 'there are a launcher and a worker');
sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE gone});
wait_for($node, $db, q{SELECT memory < 12000000 FROM sb_stat_memory}, 'most keys are gone');
append_to_file($fails, '');
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	last if 2 == grep { -e "$dir/$_" } @old;
	usleep(100_000);
}
is(scalar(grep { -e "$dir/$_" } @old), 2, 'neither can map what is to be moved');
usleep(1_000_000);
unlink $fails or die "could not remove $fails: $!";
is(sql(q{SELECT count(*), sum(count) FROM busy}), "$stay|$stay", 'nothing is lost');
ok((grep { $_ ne $old[1] } worker_of($node, $db, 'busy')), 'the worker was replaced');
my ($size, $bound) = (0, 2 * $stay * 100 * 2 + 4 * 1024 * 1024);
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	$size = 0;
	$size += -s "/dev/shm$_" // 0 foreach split /\n/, slurp_file("$dir/names");
	last if $size < $bound;
	usleep(100_000);
}
cmp_ok($size, '<', $bound, 'in the end, all is moved');
ok((grep { $_ ne $old[0] } processes($node, 'statbuffer launcher')), 'the launcher was replaced');
is(sql(qq{SELECT (count(*), sum(count)) = ($stay, $stay) FROM $_}), 't', "each key of the buffer $_ is there") foreach qw(busy halted);
sql(q{DELETE FROM halted_bad; SELECT sb_start('halted')});
is(sql("SELECT sb_drain('$_', '$patience')"), 't', "the buffer $_ is drained") foreach qw(busy halted);
is(stored_keys($node, 'busy'), ($stay + 1) . '|' . ($stay + 1), 'and each of its keys is stored once');
is(stored_keys($node, 'halted'), "$stay|$stay", 'so are those of the buffer that was stopped');
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
