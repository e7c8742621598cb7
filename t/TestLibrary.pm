# Small C libraries that tests build and have a server load, and programs.

package TestLibrary;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Utils;

our @EXPORT = qw(can_build_library build_library build_program);

sub pg_config
{
	my ($option) = @_;

	chomp(my $value = qx{pg_config --$option});
	return $value;
}

# Are a compiler and the server's headers there?
sub can_build_library
{
	my ($cc) = split / /, pg_config('cc');

	return -f pg_config('includedir-server') . '/postgres.h'
	  && system("$cc --version >/dev/null 2>&1") == 0;
}

# build_library(NAME, SOURCE...): a library of these texts of C, each compiled by
# itself.  Returns its path; it is there until the test ends.
sub build_library
{
	my ($name, @sources) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my @files;

	foreach my $i (0 .. $#sources)
	{
		push @files, "$dir/$name$i.c";
		append_to_file($files[-1], $sources[$i]);
	}
	system_or_bail(split(/ /, pg_config('cc')), '-shared', '-fPIC', '-fno-builtin', '-O1', '-w',
		'-I' . pg_config('includedir-server'), '-o', "$dir/$name.so", @files);
	return "$dir/$name.so";
}

# build_program(NAME, OPTIONS, INCLUDES, SOURCE...): a program of these files, or
# texts, of C, compiled with these options and with headers from this folder
# besides the server's.  Returns its path, or undef if that fails; it is there
# until the test ends.
sub build_program
{
	my ($name, $options, $includes, @sources) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my @files;

	foreach my $source (@sources)
	{
		push @files, -f $source ? $source : "$dir/$name" . @files . '.c';
		append_to_file($files[-1], $source) if $files[-1] ne $source;
	}
	my @command = (
		split(/ /, pg_config('cc')), '-O1', '-g', '-w', @$options, "-I$includes",
		'-I' . pg_config('includedir-server'), '-o', "$dir/$name", @files, '-lpthread');
	my ($out, $err) = run_command(\@command);
	return "$dir/$name" if -x "$dir/$name";
	diag("@command\n$err");
	return;
}

1;
