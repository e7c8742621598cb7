# The system has no memory while keys are moved, as when /dev/shm is full: those
# that were not moved stay where they are, nobody waits, and when there is memory
# again, they are moved.

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
my $keys = 300_000;
my $every = 12;
my $stay = $keys / $every;

# While there is a file "few", one segment can be made, for the new area, and
# others cannot, which is told by a file "refused".
my $dir = PostgreSQL::Test::Utils::tempdir;
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
	int file;
	if ((flags & O_CREAT) != 0 && access("$dir/few", F_OK) == 0)
	{
		file = open("$dir/one", O_CREAT | O_EXCL, 0600);
		if (file < 0)
		{
			close(open("$dir/refused", O_CREAT, 0600));
			errno = ENOSPC;
			return -1;
		}
		close(file);
	}
	return next(name, flags, mode);
}
});

my $node;
{
	local $ENV{LD_PRELOAD} = $shim;
	local $ENV{ASAN_OPTIONS} = "$ENV{ASAN_OPTIONS}:verify_asan_link_order=0" if $ENV{ASAN_OPTIONS};
	$node = new_node('refused', 'dynamic_shared_memory_type = posix', q{shared_preload_libraries = 'statbuffer'});
}

# Whoever holds a lock for good would let others wait for good.
sub answers
{
	my ($query, $expected, $what) = @_;
	my ($out, $err, $timed_out) = ('', '', 0);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$node->psql($db, $query, stdout => \$out, stderr => \$err, timed_out => \$timed_out,
		timeout => $PostgreSQL::Test::Utils::timeout_default);
	like($timed_out ? 'no answer' : "$out$err", $expected, $what);
	return !$timed_out;
}

sub wait_for_shim
{
	my ($name, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if -e "$dir/$name";
		usleep(100_000);
	}
	ok(-e "$dir/$name", $what);
	return;
}

# The worker moves the keys of one buffer, and the launcher those of another.
make_summing_buffer($node, $_, q{interval '1h', timeout '1h', batch_size '100000'}) foreach qw(busy halted gone);
sql(qq{
	CREATE PROCEDURE fill() LANGUAGE plpgsql AS \$\$
	BEGIN
		FOR i IN 1 .. 30 LOOP
			INSERT INTO gone SELECT 'key ' || g FROM generate_series(10000 * i - 9999, 10000 * i) g WHERE g % $every <> 0;
			INSERT INTO busy SELECT 'key ' || g FROM generate_series(10000 * i - 9999, 10000 * i) g WHERE g % (2 * $every) = 0;
			INSERT INTO halted SELECT 'key ' || g FROM generate_series(10000 * i - 9999, 10000 * i) g WHERE g % (2 * $every) = $every;
			COMMIT;
		END LOOP;
	END \$\$;
	CALL fill();
	INSERT INTO halted_bad VALUES ('it is stopped');
	SELECT sb_stop('halted');
});
start_worker($node, 'busy');
append_to_file("$dir/few", '');
sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE gone});
wait_for_shim('one', 'an area is made to which keys are moved');
wait_for_shim('refused', 'and then there is no more memory');
usleep(1_000_000);

if (answers(q{SELECT sb_increment('key 24', 1, 'busy')}, qr/^1$/, 'keys can be counted') &&
	answers(q{SELECT count(*), sum(count) FROM busy}, qr/^\d+\|\d+$/, 'and read') &&
	answers(q{INSERT INTO busy SELECT 'new ' || g FROM generate_series(1, 40000) g},
		qr/ERROR:  (could not (open|resize) shared memory segment|out of memory)/, 'new ones find no room'))
{
	unlink "$dir/few" or die "could not remove $dir/few: $!";
	answers(q{INSERT INTO busy SELECT 'new ' || g FROM generate_series(1, 10) g}, qr/^$/, 'and later they do');
	wait_for($node, $db, q{SELECT memory * 2 + 4 * 1024 * 1024 > mapped FROM sb_stat_memory}, 'what is left is moved') if $node->pg_version >= 17;
	is(sql('SELECT count(*), sum(count) FROM halted'), $stay / 2 . '|' . $stay / 2, 'each key is there');
	sql(q{DELETE FROM halted_bad; SELECT sb_start('halted')});
	is(sql("SELECT sb_drain('$_', '$patience')"), 't', "the buffer $_ is drained") foreach qw(busy halted);
	is(stored_keys($node, 'busy'), ($stay / 2 + 11) . '|' . ($stay / 2 + 12), 'and is stored once');
	is(stored_keys($node, 'halted'), $stay / 2 . '|' . $stay / 2, 'so are those of the buffer that was stopped');
}
has_not_crashed($node, 'no process has crashed');
$node->stop('fast');
done_testing();
