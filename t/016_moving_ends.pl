# While keys are moved because most are gone: a process is killed at each step of
# it, and the move goes with the memory; the columns of a buffer are altered, and
# the server stops, and each count is there.

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
my $stay = 15_000;

# A buffer of which all goes, one that has a worker, and one that is stopped, whose
# keys the launcher moves.
sub make_buffers
{
	my ($node) = @_;

	make_summing_buffer($node, $_, q{interval '1h', timeout '1h', batch_size '100000', shutdown '0'}) foreach qw(busy halted);
	sql(q{
		CREATE FUNCTION forget(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS '';
		ALTER TABLE busy_stored SET LOGGED;
		INSERT INTO halted_bad VALUES ('it is stopped');
		CREATE PROCEDURE fill(stay int) LANGUAGE plpgsql AS $$
		BEGIN
			CREATE FOREIGN TABLE gone (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
				SERVER statbuffer OPTIONS (handler 'forget', interval '1h');
			FOR i IN 1 .. 15 LOOP
				INSERT INTO gone SELECT 'key ' || g FROM generate_series(10000 * i - 9999, 10000 * i) g;
				INSERT INTO busy SELECT 'key ' || g FROM generate_series(stay / 15 * (i - 1) + 1, stay / 15 * i) g;
				INSERT INTO halted SELECT 'key ' || g FROM generate_series(stay / 15 * (i - 1) + 1, stay / 15 * i) g;
				COMMIT;
			END LOOP;
		END $$});
	return;
}

# Fill the buffers, and let most of the keys go; a moment later, the others are moved.
sub let_most_go
{
	sql(qq{SELECT sb_start('halted'); CALL fill($stay)});
	sql(q{SELECT sb_stop('halted')});
	start_worker($_[0], 'busy');
	sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE gone});
	wait_for($_[0], $db, q{SELECT memory < 6000000 FROM sb_stat_memory}, 'most keys are gone');
	return;
}

# --- killed at each step ------------------------------------------------------

# A process kills itself when it makes the first or a later segment, or removes
# one, while there is a file of that name.
my $dir = PostgreSQL::Test::Utils::tempdir;
my $shim = build_library('shm_shim', qq{
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
static void
step(const char *name)
{
	char path[1024];
	snprintf(path, sizeof(path), "$dir/%s", name);
	if (unlink(path) == 0)
		kill(getpid(), SIGKILL);
}
static void
note(const char *name)
{
	char path[1024];
	snprintf(path, sizeof(path), "$dir/%s", name);
	close(open(path, O_CREAT | O_WRONLY, 0600));
}
int
shm_open(const char *name, int flags, mode_t mode)
{
	int (*next) (const char *, int, mode_t) = dlsym(RTLD_NEXT, "shm_open");
	int file;
	if ((flags & O_CREAT) == 0)
		return next(name, flags, mode);
	if (access("$dir/made", F_OK) == 0)
		step("further");
	else
		step("before");
	file = next(name, flags, mode);
	note("made");
	step("after");
	return file;
}
int
shm_unlink(const char *name)
{
	int (*next) (const char *) = dlsym(RTLD_NEXT, "shm_unlink");
	int result;
	if (access("$dir/made", F_OK) != 0)
		return next(name);
	step("removal");
	result = next(name);
	step("removed");
	return result;
}
});

my $node;
{
	local $ENV{LD_PRELOAD} = $shim;
	local $ENV{ASAN_OPTIONS} = "$ENV{ASAN_OPTIONS}:verify_asan_link_order=0" if $ENV{ASAN_OPTIONS};
	$node = new_node('killed', 'dynamic_shared_memory_type = posix', 'restart_after_crash = on',
		q{shared_preload_libraries = 'statbuffer'});
}
make_buffers($node);
my @steps = (
	[ before => 'before an area is made' ],
	[ after => 'when it is made' ],
	[ further => 'when keys are moved' ],
	[ removal => 'before the old area is removed' ],
	[ removed => 'when it is removed' ]);
foreach (@steps)
{
	my ($step, $what) = @$_;
	let_most_go($node);

	# what was freed goes back to the system before the move begins
	usleep(1_000_000);
	unlink "$dir/made";
	my $offset = -s $node->logfile;
	append_to_file("$dir/$step", '');
	$node->wait_for_log(qr/was terminated by signal 9/, $offset);
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	ok(!-e "$dir/$step", "a process is killed $what");
	is(sql('SELECT (SELECT count(*) FROM busy) + (SELECT count(*) FROM halted)'), 0, "$what: what was held is gone");
	sql(q{SELECT sb_start('halted'); SELECT sb_increment('key', 1, 'busy')});
	is(sql("SELECT sb_drain('busy', '$patience')"), 't', "$what: the server counts and flushes");
}
is(stored_keys($node, 'busy'), 2 * @steps . '|' . 2 * @steps, 'nothing was stored of what was lost');
$node->stop;

# --- columns are altered, and the server stops --------------------------------

# Until the server stops, a transaction that waits for a standby that there is not
# has pinned a key, so that the move does not end.
$node = new_node('stopped', 'dynamic_shared_memory_type = mmap', q{synchronous_standby_names = 'nobody'},
	'synchronous_commit = local', 'wal_level = replica', 'max_wal_senders = 2', q{shared_preload_libraries = 'statbuffer'});
make_buffers($node);
make_buffer($node, $db, 'pinned', q{interval '1h', timeout '1h'});
make_buffer($node, $db, 'retyped', q{interval '1h', timeout '1h'});
sql(q{SELECT sb_increment('key ' || g, 1, b::regclass) FROM generate_series(1, 500) g, unnest(ARRAY['pinned', 'retyped']) b});

sub segments
{
	return map { $_ => 1 } glob $node->data_dir . '/pg_dynshmem/*';
}

sub is_moving
{
	my ($what, %old) = @_;
	my ($nold, $nnew);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my %now = segments();
		$nold = grep { $now{$_} } keys %old;
		$nnew = grep { !$old{$_} } keys %now;
		last if $nnew > 0;
		usleep(100_000);
	}
	ok($nold > 1 && $nnew > 0, $what) or diag("$nold old segments, $nnew new ones");
	return;
}

my $session = start_session($node, $db, q{
	SET synchronous_commit = on;
	CREATE TABLE written (a int);
	SELECT sb_increment('key 250', 1, 'pinned')});
wait_for_session($session, q{a.wait_event = 'SyncRep'}, 'a transaction that commits has pinned a key');
let_most_go($node);
my %old = segments();
is_moving('keys are moved', %old);
sql(q{ALTER FOREIGN TABLE retyped ALTER key TYPE varchar(20)});
sql(q{SELECT sb_increment('key ' || g, 10, 'retyped') FROM generate_series(491, 510) g});
is_moving('and still are when a column has another type', %old);
sql(q{ALTER FOREIGN TABLE retyped ALTER key TYPE text});
is(sql(q{SELECT sum(sb_count('key ' || g, 'retyped')) FROM generate_series(1, 490) g}), 490, 'when it has its type again, keys are found');
is(sql(q{SELECT count(*), sum(count) FROM busy}), "$stay|$stay", 'those of another buffer are there');
is_moving('all that time', %old);
$node->stop('fast');
$session->{run}->finish;
$node->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
$node->start;
is(sql(q{SELECT count(*), sum(count) FROM pinned}), '500|501', 'after a restart those are there that were pinned');
is(sql(qq{SELECT (count(*), sum(count)) = ($stay, $stay) FROM $_}), 't', "and those of the buffer $_") foreach qw(busy halted);
sql(q{DELETE FROM halted_bad; SELECT sb_start('halted')});
is(sql("SELECT sb_drain('$_', '$patience')"), 't', "the buffer $_ is drained") foreach qw(busy halted pinned);
is(stored_keys($node, 'busy'), ($stay + 1) . '|' . ($stay + 1), 'and each of its keys is stored once');
is(stored_keys($node, 'halted'), "$stay|$stay", 'so are those of the buffer that was stopped');
is(stored($node, $db, 'pinned'), 501, 'so is the buffer with the pinned key');
sql(q{SELECT sb_flush_all('retyped')});
wait_for_stored($node, $db, 'retyped', 500 + 200, 'and what was counted under either type');
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
